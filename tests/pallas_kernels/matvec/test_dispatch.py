"""The launch of the matvec kernel: when it is chosen or declined, its tuning, and its lowering for absent
GPUs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from marks import slow
from matvec_cases import Case

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model.decoder import linear_shapes
from pallas_kernels import Activations, NestedWeight, graded_matvec, layout
from pallas_kernels.lanes import device
from pallas_kernels.matvec import choose, xla
from pallas_kernels.matvec.mosaic_gpu import Config, geometry, kernel, supports, tuning
from pallas_kernels.matvec.mosaic_gpu.byte_pairs import BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows import DenseRowsGeometry

SHAPES = [(1024, 1024), (2048, 8192), (4096, 24576), (5120, 151936), (300, 700), (64, 100), (576, 960)]
GPUS = [("NVIDIA H200", 132), ("NVIDIA GeForce RTX 4090", 128)]

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)


def compiling_for(kind: str, multiprocessors: int, platform: str = "gpu"):
    """Returns a context that lowers programs for a device that is absent."""
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


def abstract_arguments(in_features, out_features, rows=1, max_bits=8, dtype="bfloat16"):
    return (
        jax.ShapeDtypeStruct((rows, in_features), dtype),
        NestedWeight.abstract(in_features, out_features, max_bits),
        jax.ShapeDtypeStruct((rows, max_bits // 2), jnp.float32),
    )


@needs_mosaic
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "max_bits", "dtype"),
    [(1, 8, "float32"), (3, 4, "bfloat16"), (8, 6, "float16"), (16, 8, "bfloat16")],
)
def test_lowers_for(gpu, shape, rows, max_bits, dtype):
    arguments = abstract_arguments(*shape, rows, max_bits, dtype)
    with compiling_for(*gpu):
        assert choose(*arguments[:2]) == "mosaic_gpu"
        lowered = jax.jit(graded_matvec).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mosaic_gpu" in text
    assert "tensor<i8>" not in text  # No copy of the planes in another type.


@needs_mosaic
@pytest.mark.parametrize("gpu", [("NVIDIA B200", 148), ("NVIDIA GeForce RTX 5090", 170)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_lowers_for_blackwell(gpu, rows):
    """Nobody has run the kernels on compute capability 10.0 and 12.0."""
    arguments = abstract_arguments(4096, 6144, rows)
    with compiling_for(*gpu):
        assert choose(*arguments[:2]) == "mosaic_gpu"
        text = jax.jit(graded_matvec).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@needs_mosaic
def test_lowers_inside_a_while_loop():
    def three_times(x, weight, thresholds):
        def step(carry):
            i, x = carry
            return i + 1, graded_matvec(x, weight, thresholds)[0].astype(x.dtype)

        return jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))

    with compiling_for(*GPUS[0]):
        jax.jit(three_times).trace(*abstract_arguments(512, 512)).lower(lowering_platforms=("cuda",))


@needs_mosaic
@pytest.mark.parametrize(("rows", "launches"), [(16, 1), (17, 2), (64, 1), (1024, 1), (1029, 2)])
def test_more_rows_are_launched_in_a_loop(rows, launches):
    """The loop has one launch, of 16 rows, and the rows that are left another."""
    arguments = abstract_arguments(512, 1024, rows)
    with compiling_for(*GPUS[0]):
        assert choose(*arguments[:2]) == "mosaic_gpu"
        text = jax.jit(graded_matvec).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == launches


@pytest.mark.parametrize("rows", [17, *slow(16, 32, 45)])
@pytest.mark.parametrize("norm", [False, True])
def test_batches_of_rows_equal_all_rows_at_once(monkeypatch, rows, norm):
    launched = []

    def launch(x, weight, thresholds, config):
        launched.append(x.leading[0])
        return xla.partial_sums(x, weight, thresholds)

    monkeypatch.setattr(kernel, "_launch", launch)
    x, weight, thresholds = jax.tree.map(jnp.asarray, Case(300, 200, rows=rows).arrays())
    squares = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (rows, 3)), jnp.float32) if norm else None
    activations = Activations.of(x, squares, eps=1e-6)
    y, stats = kernel.partial_sums(activations, weight, thresholds)
    expected, expected_stats = xla.partial_sums(activations, weight, thresholds)
    assert max(launched) == 16
    assert y.leading == (rows,)
    np.testing.assert_allclose(y.array, expected.array, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stats.bits, expected_stats.bits)
    np.testing.assert_allclose(stats.max_abs, expected_stats.max_abs, rtol=1e-6)


@needs_mosaic
def test_declines_with_a_reason():
    x, weight, _ = abstract_arguments(256, 512)
    with compiling_for("NVIDIA H200", 132):
        assert supports(x, weight) is None
        assert supports(jax.ShapeDtypeStruct((0, 256), jnp.float32), weight) == "takes at least one row"
        huge = abstract_arguments(65536, 131072)
        assert "addresses at most 4294967296 bytes" in supports(*huge[:2])
    with compiling_for("AMD Instinct MI300X", 304):
        assert supports(x, weight) == "needs an NVIDIA GPU, the device is AMD Instinct MI300X"
    with compiling_for("TPU v6 lite", 1, "tpu"):
        assert supports(x, weight) == "needs an NVIDIA GPU, the device is tpu"


def test_declines_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    x, weight, _ = abstract_arguments(256, 512)
    assert supports(x, weight).startswith("needs jax >= 0.11.2, this is ")


def test_declines_a_jax_newer_than_the_tested_versions(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    x, weight, _ = abstract_arguments(256, 512)
    reason = supports(x, weight)
    assert reason.startswith("is tested with jax < 0.13, this is ")
    assert reason.endswith("pip install 'grinqh-jax[gpu]'")


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0", "12.0"])
def test_takes_newer_gpus(monkeypatch, capability):
    @dataclasses.dataclass
    class Gpu:
        platform: str = "gpu"
        device_kind: str = "NVIDIA of some kind"
        compute_capability: str = capability

    monkeypatch.setattr(jax, "__version_info__", device.OLDEST_JAX)
    monkeypatch.setattr(device, "target_device", Gpu)
    assert supports(*abstract_arguments(256, 512)[:2]) is None


@dataclasses.dataclass
class OldGpu:
    platform: str = "gpu"
    device_kind: str = "NVIDIA Tesla V100"
    compute_capability: str = "7.0"


def test_declines_an_old_gpu(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", device.OLDEST_JAX)
    monkeypatch.setattr(device, "target_device", OldGpu)
    x, weight, _ = abstract_arguments(256, 512)
    assert supports(x, weight) == "needs compute capability 8.0 or later, NVIDIA Tesla V100 has 7.0"


def test_a_cpu_runs_xla_and_the_kernel_declines_with_a_reason():
    x, weight, thresholds = Case(64, 64).arrays()
    assert choose(x, weight) == "xla"
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu: needs (an NVIDIA GPU|jax)"):
        graded_matvec(x, weight, thresholds, implementation="mosaic_gpu")


def sizes(k, n, rows=1, planes=4) -> geometry.Geometry:
    return geometry.Geometry(
        in_features=k,
        stored_k=k,
        stored_n=n,
        planes=planes,
        rows=rows,
        x_dtype="bfloat16",
        config=kernel.ANY_CONFIG,
    )


def test_measured_configurations_take_precedence_over_the_rule():
    best = tuning.best_config(sizes(4096, 24576), device_kind="NVIDIA H200", multiprocessors=132)
    assert best == Config(warpgroups=1, warps_per_group=1, ring_slots=8)
    other = tuning.best_config(sizes(4096, 24576), device_kind="NVIDIA H9000", multiprocessors=10)
    assert other == tuning.rule(sizes(4096, 24576), 10)


def test_every_measured_shape_belongs_to_a_model():
    configs = random_model.shapes().values()
    known = {layout.padded_shape(*shape) for config in configs for shape in linear_shapes(config).values()}
    measured = json.loads((pathlib.Path(tuning.__file__).parent / "measured.json").read_text())
    for device_kind, entries in measured.items():
        shapes = [(entry["stored_k"], entry["stored_n"]) for entry in entries]
        assert set(shapes) <= known, device_kind
        assert len(set(shapes)) == len(shapes), device_kind
        for shape, entry in zip(shapes, entries, strict=True):
            best = tuning.best_config(sizes(*shape), device_kind=device_kind, multiprocessors=132)
            assert best == Config(**entry["config"])


@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 6144), (4096, 24576), (12288, 4096)])
def test_the_rule_agrees_with_the_measurements(k, n):
    """The rule's model may prefer another configuration, but by no more than 10 % of its expected time."""
    best = tuning.best_config(sizes(k, n), device_kind="NVIDIA H200", multiprocessors=132)
    expected = tuning.expected_microseconds(dataclasses.replace(sizes(k, n), config=best), 132)
    chosen = dataclasses.replace(sizes(k, n), config=tuning.rule(sizes(k, n), 132))
    assert (
        tuning.expected_microseconds(chosen, 132)
        <= expected
        <= 1.1 * tuning.expected_microseconds(chosen, 132)
    )


@pytest.mark.parametrize("multiprocessors", [60, 114, 128, 132])
@pytest.mark.parametrize("k", [128, 1024, 4096, 14336])
@pytest.mark.parametrize("n", [512, 4096, 28672, 152064])
def test_the_rule_gives_launches_that_fit(k, n, multiprocessors):
    launch = sizes(k, n)
    launch = dataclasses.replace(launch, config=tuning.rule(launch, multiprocessors))
    assert launch.shared_bytes <= geometry.SHARED_BYTES_LIMIT
    assert launch.splits * launch.config.groups_per_cta >= launch.groups
    assert launch.matvec_blocks == launch.tiles * launch.splits


@pytest.mark.parametrize("device_kind", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize("shape", [(128, 512), (4096, 24576), (12288, 4096), (14336, 4096)], ids=str)
def test_several_rows_have_the_order_of_sums_of_one_row(shape, device_kind):
    gpu = {"device_kind": device_kind, "multiprocessors": 130}
    alone = tuning.best_config(sizes(*shape), **gpu)
    for rows in range(2, 17):
        config = tuning.best_config(sizes(*shape, rows=rows), **gpu)
        assert (config.byte_pairs is None) != (config.dense_rows is None)
        assert dataclasses.replace(config, byte_pairs=None, dense_rows=None) == alone
        program = BytePairGeometry if config.byte_pairs else DenseRowsGeometry
        launch = program(**{**vars(sizes(*shape, rows=rows)), "config": config})
        most = tuning.SHARED_BYTES_PER_SM if device_kind == "NVIDIA H200" else geometry.SHARED_BYTES_LIMIT
        assert launch.shared_bytes <= most


def test_a_tuned_gpu_with_little_shared_memory_gets_launches_that_fit(monkeypatch):
    """This order of sums leaves no room for the codes of more than 8 rows, so each row reads the weights."""
    kind, alone = "NVIDIA GeForce RTX 4090", Config(warpgroups=2, warps_per_group=1, ring_slots=4)
    monkeypatch.setattr(tuning, "_measured", lambda: {kind: {(12288, 4096): alone}})
    for rows in range(2, 17):
        config = tuning.best_config(sizes(12288, 4096, rows=rows), device_kind=kind, multiprocessors=128)
        assert (config == alone) == (rows > 8)
        program = geometry.Geometry
        if rows <= 8:
            program = BytePairGeometry if config.byte_pairs else DenseRowsGeometry
        launch = program(**{**vars(sizes(12288, 4096, rows=rows)), "config": config})
        assert launch.shared_bytes <= geometry.SHARED_BYTES_LIMIT


@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize("warps_per_group", [1, 2, 4])
def test_pairs_of_bytes_fit_the_limit(warpgroups, warps_per_group):
    alone = Config(warpgroups=warpgroups, warps_per_group=warps_per_group, ring_slots=8)
    for rows in range(2, 5):
        launch = sizes(2048, 2048, rows=rows)
        for limit, always in ((geometry.SHARED_BYTES_LIMIT, warpgroups == 1), (227 * 1024, True)):
            config = tuning.with_byte_pairs(launch, alone, 128, limit)
            assert config is not None or not always
            if config is not None:
                fields = {**vars(launch), "config": config, "num_square_partials": 32}
                assert BytePairGeometry(**fields).shared_bytes <= limit


@pytest.mark.parametrize(
    ("shape", "rows", "slots"),
    [
        *(((k, n), rows, 4) for k, n in [(12288, 4096), (4096, 4096), (4096, 24576)] for rows in (2,)),
        *(((k, n), rows, 8) for k, n in [(12288, 4096), (4096, 4096)] for rows in (3, 4)),
        *(((4096, 24576), rows, None) for rows in (3, 4)),
        *(((12288, 4096), rows, None) for rows in (5, 8, 9, 16)),
    ],
    ids=str,
)
def test_an_h200_runs_the_program_that_was_fastest(shape, rows, slots):
    """None is the program without lists. Pairs of bytes take two waves on 4096x24576, two reads of 5 rows."""
    config = tuning.best_config(sizes(*shape, rows=rows), device_kind="NVIDIA H200", multiprocessors=132)
    assert (config.byte_pairs and config.byte_pairs.ring_slots) == slots


def test_partial_sums_are_added_in_order():
    """float32 addition is not associative: 2**24 absorbs 1 unless it cancels first."""
    partials = jnp.asarray([2.0**24, -(2.0**24), 1.0, 2.0**24], jnp.float32)[:, None, None]
    for order, total in (([0, 1, 2, 3], 2.0**24), ([0, 1, 2], 1), ([2, 0, 1], 0)):
        assert Activations.sums(partials[jnp.asarray(order)], 1).array[0, 0] == total
