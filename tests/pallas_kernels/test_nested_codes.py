"""Nested codes: round trips, the half-step formula, adversarial weights and refused inputs."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples, shapes

from pallas_kernels import codes, layout
from pallas_kernels.weight import NestedWeight

SLACK = 1 + 1e-4
"""Factor on a half step for the rounding of ``w / scale + 2`` to float32, which is 2**-15 of the 8-bit half
step."""

SUBNORMAL = 1e-37
"""Float32 weights below this may count as zeros."""

few = examples(6)
many = examples(60)
any_shape = shapes((1, 1), (127, 31), (128, 512), (129, 40), (200, 513), (130, 960), (300, 1100))
max_bits = pytest.mark.parametrize("max_bits", [2, 4, 6, 8])


def gaussian(k, n, seed=0):
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def adversarial():
    """Returns weights of 200 channels that are difficult for a quantizer."""
    w = gaussian(200, 9)
    one_huge = w.copy()
    one_huge[7, 3] = -131008.0
    alternating = np.where(np.arange(200)[:, None] % 2, 1.0, -1.0) * np.abs(w[:1])
    return {
        "gaussian": w,
        "heavy-tailed": np.random.default_rng(1).standard_t(1.5, (200, 9)).astype(np.float32),
        "zeros": np.zeros((200, 9), np.float32),
        "zeros in one group": np.where(np.arange(200)[:, None] < 128, 0, w),
        "one huge value": one_huge,
        "scales are subnormal float16": w * 2e-8,
        "largest that float16 scales hold": np.sign(w) * 131008,
        "float32 subnormals": w * 1e-39,
        "constant": np.full((200, 9), 0.3, np.float32),
        "negative constant": np.full((200, 9), -0.3, np.float32),
        "two values": alternating,
        "a scale just above a float16": np.full((200, 9), 2 * (1 + 2**-11 + 2**-20), np.float32),
    }


@few
@given(shape=any_shape, bits=st.sampled_from([2, 4, 6, 8]))
def test_codes_of_any_shape_survive_a_round_trip(shape, bits):
    k, n = shape
    rng = np.random.default_rng(k * n)
    code = rng.integers(0, 256, (k, n), dtype=np.uint8)
    scales = rng.uniform(0, 2, (-(-k // 128), n)).astype(np.float16)
    weight = codes.from_codes(jnp.asarray(code), jnp.asarray(scales), max_bits=bits)
    weight.check()
    expected = np.stack([code >> (6 - 2 * f) & 3 for f in range(bits // 2)])
    np.testing.assert_array_equal(list(matvec_oracle.digits(weight)), expected)
    unpacked = np.asarray(jax.jit(codes.unpack)(weight.planes))
    np.testing.assert_array_equal(unpacked[:, :k, :n], expected)
    assert not unpacked[:, k:].any()
    assert not unpacked[..., n:].any()
    assert not np.asarray(weight.scales)[:, n:].any()
    repacked = sum(digit.astype(np.int32) << (6 - 2 * f) for f, digit in enumerate(unpacked))
    np.testing.assert_array_equal(
        codes.pack(jnp.asarray(repacked.astype(np.uint8)), bits // 2), weight.planes
    )


@few
@given(shape=any_shape, bits=st.sampled_from([2, 4, 6, 8]))
def test_weights_of_any_shape_are_within_the_half_step_at_full_level(shape, bits):
    k, n = shape
    w = gaussian(k, n)
    weight = codes.quantize(jnp.asarray(w), max_bits=bits)
    weight.check()
    assert (weight.in_features, weight.out_features, weight.max_bits) == (k, n, bits)
    error = np.abs(matvec_oracle.dequantize(weight, bits // 2) - w)
    half_step = 0.5 * 4.0 ** (1 - bits // 2)
    assert (error <= matvec_oracle.scale_of_each_weight(weight) * half_step * SLACK).all()


@pytest.mark.parametrize("name", adversarial())
def test_every_level_of_adversarial_weights_is_within_its_half_step(name):
    w = adversarial()[name]
    weight = codes.quantize(jnp.asarray(w))
    weight.check()
    scale = matvec_oracle.scale_of_each_weight(weight)
    for level in range(1, 5):
        error = np.abs(matvec_oracle.dequantize(weight, level) - w)
        assert (error <= scale * 0.5 * 4.0 ** (1 - level) * SLACK + SUBNORMAL).all()


@many
@given(hnp.arrays(np.float32, (130, 3), elements=st.floats(-131008, 131008, width=32), fill=st.just(0)))
def test_any_finite_weights_are_within_the_half_step(w):
    weight = codes.quantize(jnp.asarray(w))
    error = np.abs(np.asarray(codes.dequantize(weight)).astype(np.float64) - w)
    assert (error <= matvec_oracle.scale_of_each_weight(weight) / 128 * SLACK + SUBNORMAL).all()


def test_scales_are_half_the_largest_magnitude_rounded_up():
    w = gaussian(300, 40)
    padded = np.abs(np.pad(w, ((0, 84), (0, 0)))).reshape(3, 128, 40).max(1) / 2
    scales = np.asarray(codes.max_abs_scales(jnp.asarray(w))).astype(np.float64)
    assert (scales >= padded).all()
    assert (scales <= padded * (1 + 2.0**-10)).all()
    assert codes.max_abs_scales(jnp.asarray([[2.5]])) == 1.25


def test_zeros_stay_exactly_zero():
    weight = codes.quantize(jnp.zeros((200, 60)))
    for level in range(5):
        assert not np.asarray(codes.dequantize(weight, level)).any()


@max_bits
def test_dequantize_follows_the_half_step_formula(max_bits):
    weight = codes.quantize(jnp.asarray(gaussian(200, 600)), max_bits=max_bits)
    planes = max_bits // 2
    for level in range(planes + 1):
        expected = matvec_oracle.dequantize(weight, level)
        np.testing.assert_allclose(codes.dequantize(weight, level), expected, rtol=1e-6)
    np.testing.assert_array_equal(codes.dequantize(weight), codes.dequantize(weight, planes))
    np.testing.assert_array_equal(codes.dequantize(weight, 7), codes.dequantize(weight, planes))
    level = np.random.default_rng(0).integers(0, planes + 1, 200)
    expected = matvec_oracle.dequantize(weight, level)
    np.testing.assert_allclose(codes.dequantize(weight, jnp.asarray(level)), expected, rtol=1e-6)


def test_dequantize_casts_at_the_end():
    weight = codes.quantize(jnp.asarray(gaussian(200, 60)))
    half = codes.dequantize(weight, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half, codes.dequantize(weight).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_weights_get_the_codes_of_their_float32_values(dtype):
    w = jnp.asarray(gaussian(200, 60)).astype(dtype)
    half, full = codes.quantize(w), codes.quantize(w.astype(jnp.float32))
    np.testing.assert_array_equal(half.planes, full.planes)
    np.testing.assert_array_equal(half.scales, full.scales)


@max_bits
def test_fewer_bits_store_the_leading_planes(max_bits):
    w = jnp.asarray(gaussian(200, 600))
    full, short = codes.quantize(w), codes.quantize(w, max_bits=max_bits)
    np.testing.assert_array_equal(short.planes, full.planes[: max_bits // 2])
    np.testing.assert_array_equal(short.scales, full.scales)
    np.testing.assert_array_equal(codes.dequantize(short), codes.dequantize(full, max_bits // 2))


def test_level_errors_start_at_the_mean_square_and_fall_with_the_level():
    w = gaussian(200, 60)
    weight = codes.quantize(jnp.asarray(w))
    expected = [np.mean((w - matvec_oracle.dequantize(weight, level)) ** 2) for level in range(5)]
    errors = np.asarray(codes.level_errors(jnp.asarray(w), weight))
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    assert (np.diff(errors) < 0).all()


def test_level_gains_multiply_their_levels():
    weight = codes.quantize(jnp.asarray(gaussian(200, 60)))
    gains = [0.85, 0.98, 1.01, 1.0]
    scaled = dataclasses.replace(weight, level_gains=jnp.asarray(gains))
    scaled.check()
    for level, gain in enumerate(gains, start=1):
        expected = gain * matvec_oracle.dequantize(weight, level)
        np.testing.assert_allclose(codes.dequantize(scaled, level), expected, rtol=1e-6)
    np.testing.assert_array_equal(codes.dequantize(scaled), codes.dequantize(weight))
    level = np.arange(200) % 5
    expected = matvec_oracle.dequantize(weight, level) * np.append(1, gains)[level][:, None]
    np.testing.assert_allclose(codes.dequantize(scaled, jnp.asarray(level)), expected, rtol=1e-6)


def test_level_errors_agree_with_the_oracle():
    w = gaussian(200, 60)
    weight = codes.quantize(jnp.asarray(w))
    read = np.stack([matvec_oracle.dequantize(weight, level) for level in range(5)])
    errors = codes.level_errors(jnp.asarray(w), weight)
    np.testing.assert_allclose(errors, np.mean((w - read) ** 2, axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        ([[1.0, np.nan], [np.inf, 0.0]], "layers.3.o: 2 of 4 values are NaN or Inf"),
        ([[0.0, -131100.0]], "layers.3.o: largest magnitude 131100 exceeds 131008"),
        ([1.0, 2.0], r"layers.3.o: shape \(2,\)"),
        (np.zeros((0, 3), np.float32), r"layers.3.o: shape \(0, 3\)"),
        (np.zeros((2, 3), np.int32), "layers.3.o: dtype int32"),
    ],
)
def test_refuses_weights_that_cannot_be_quantized_by_name(w, message):
    with pytest.raises(ValueError, match=message):
        codes.quantize(jnp.asarray(w), name="layers.3.o")


@pytest.mark.parametrize("bits", [0, 3, 10])
def test_refuses_unknown_bits(bits):
    with pytest.raises(ValueError, match=f"max_bits must be 2, 4, 6 or 8, not {bits}"):
        codes.quantize(jnp.ones((2, 2)), max_bits=bits)


def test_refuses_scales_whose_shape_does_not_match_the_codes():
    with pytest.raises(ValueError, match=r"scales has shape \(1, 5\), expected \(2, 5\)"):
        codes.from_codes(jnp.zeros((200, 5), jnp.uint8), jnp.ones((1, 5), jnp.float16))


def test_check_names_every_problem_at_once():
    weight = codes.quantize(jnp.ones((200, 30)))
    broken = NestedWeight(
        planes=weight.planes[:, :128].astype(jnp.int32),
        scales=-weight.scales,
        in_features=200,
        out_features=30,
    )
    with pytest.raises(ValueError, match=r"^head: ") as caught:
        broken.check("head")
    for text in ("expected (4, 256, 4)", "dtype int32, expected uint32", "negative or non-finite"):
        assert text in str(caught.value)
    for problem, message in (
        ({"planes": weight.planes[0]}, r"expected \[1..4, 256, 4\]"),
        ({"scales": weight.scales[:1]}, r"scales has shape \(1, 64\), expected \(2, 64\)"),
        ({"scales": weight.scales.astype(jnp.float32)}, "dtype float32, expected float16"),
        ({"scales": weight.scales * jnp.float16(np.inf)}, "negative or non-finite"),
        ({"in_features": 600}, "planes has shape .* scales has shape"),
        ({"level_gains": jnp.ones(3)}, r"level_gains is float32 \(3,\), expected float32 \(4,\)"),
        (
            {"level_gains": jnp.full(4, 0.5)},
            "level_gains is .*, expected finite numbers above 0, the last of them 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(weight, **problem).check()


@max_bits
def test_the_abstract_weight_matches_the_quantized_weight(max_bits):
    weight = codes.quantize(jnp.ones((130, 513)), max_bits=max_bits)
    abstract = NestedWeight.abstract(130, 513, max_bits)
    assert jax.tree.structure(weight) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weight) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )
    assert weight.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    assert abstract.nbytes == weight.nbytes


def test_the_weight_passes_through_jax_transformations():
    weight = codes.quantize(jnp.asarray(gaussian(200, 600)))
    expected = np.asarray(codes.dequantize(weight))
    np.testing.assert_allclose(jax.jit(codes.dequantize)(weight), expected, rtol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
    np.testing.assert_allclose(jax.vmap(codes.dequantize)(stacked)[1], expected, rtol=1e-6)
    mesh = jax.make_mesh((1,), ("outputs",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    split = {"planes": spec(None, None, "outputs"), "scales": spec(None, "outputs"), "level_gains": spec()}
    specs = dataclasses.replace(weight, **split)
    sharded = jax.shard_map(
        codes.dequantize, mesh=mesh, in_specs=(specs,), out_specs=spec(None, "outputs"), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(sharded)(weight), expected, rtol=1e-6)


@pytest.mark.parametrize("outputs", [64, 448, 512, 576, 1536, 1920])
def test_outputs_are_permuted_inside_each_tile(outputs):
    positions = layout.digit_major_positions(outputs)
    assert sorted(positions) == list(range(outputs))
    words = positions % (outputs // 16)
    assert (words // layout.TILE_WORDS == np.arange(outputs) // layout.TILE).all()
    assert layout.last_tile_pieces(outputs) == (outputs % 512 or 512) // 64


@pytest.mark.parametrize(
    ("outputs", "stored"),
    [
        *((1, 64), (64, 64), (65, 128), (448, 448), (449, 512), (513, 576), (960, 960), (961, 1024)),
        *((1985, 2048), (2304, 2304), (128256, 128512), (151936, 152064)),
    ],
)
def test_outputs_are_padded_to_pieces_or_if_that_is_little_to_tiles(outputs, stored):
    assert layout.padded_shape(1, outputs) == (128, stored)
    assert layout.padded_shape(1, stored) == (128, stored)
    assert matvec_oracle.padded_shape(1, outputs) == (128, stored)
