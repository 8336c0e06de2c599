"""The lane program of dequantization on the emulator: bit for bit the format's definition."""

import dataclasses

import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import NestedWeight, dequantization
from pallas_kernels.dequantization.program import THREADS, Refs, Shape, dequantization_program
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.lanes import device
from pallas_kernels.lanes.emulator import NumpyInstructions


def random_weight(in_features: int, out_features: int, planes: int, seed: int = 0) -> NestedWeight:
    """Returns random codes, also in the padding. Some scales are zero or subnormal."""
    rng = np.random.default_rng((in_features + planes, seed))
    k, n = matvec_oracle.padded_shape(in_features, out_features)
    scales = rng.uniform(0.001, 3, (k // matvec_oracle.GROUP, n)).astype(np.float16)
    scales[:, ::7], scales[:, 1::7] = 0, 1e-7
    words = rng.integers(0, 2**32, (planes, k, n // matvec_oracle.WORD_OUTPUTS), np.uint32)
    return NestedWeight(words, scales, in_features, out_features)


def exact(weight: NestedWeight) -> np.ndarray:
    """Returns the weight at its highest level, rounded once to bfloat16."""
    return matvec_oracle.dequantize(weight, weight.num_planes).astype(jnp.bfloat16)


def experts_of(weights: list[NestedWeight]) -> NestedExperts:
    """Returns weights of one shape as experts."""
    planes, scales = (np.stack([getattr(w, name) for w in weights]) for name in ("planes", "scales"))
    return NestedExperts(planes, scales, weights[0].in_features, weights[0].out_features)


def emulate(weight: NestedWeight | NestedExperts, shape: Shape) -> np.ndarray:
    isa = NumpyInstructions(blocks=shape.blocks, threads=THREADS, shared_bytes=0)
    dense = np.full(shape.dense, np.nan, jnp.bfloat16)
    arrays = (isa.array(a) for a in (weight.planes, weight.scales, dense))
    dequantization_program(isa, shape, Refs(*arrays, shared=None))
    isa.finish()
    return dense


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "size", [(128, 512), (256, 1024), (130, 520), (301, 1000), (140, 64), (128, 960), (257, 312)], ids=str
)
@pytest.mark.parametrize("unread", [0, 1])
def test_equals_the_definition(size, planes, unread):
    """Planes that are stored and not read do not matter."""
    weight = random_weight(*size, planes + unread)
    dense = emulate(weight, Shape(*size, weight.scales.shape[1], planes, planes + unread))
    np.testing.assert_array_equal(dense, exact(dataclasses.replace(weight, planes=weight.planes[:planes])))


@pytest.mark.parametrize(("size", "planes"), [((128, 512), 4), ((301, 1000), 3), ((257, 312), 2)], ids=str)
def test_all_experts_equal_the_definition(size, planes):
    """A stored plane is not read."""
    weights = [random_weight(*size, 1 + planes, seed) for seed in range(3)]
    experts = experts_of(weights)
    dense = emulate(experts, Shape(*size, weights[0].scales.shape[1], planes, 1 + planes, len(weights)))
    for one, weight in zip(dense, weights, strict=True):
        np.testing.assert_array_equal(one, exact(dataclasses.replace(weight, planes=weight.planes[:planes])))


def test_declines_with_a_reason():
    weight = NestedWeight.abstract(256, 1004)
    assert "multiple of 8 outputs, not 1004" in dequantization.supports(weight, jnp.bfloat16)
    assert "bfloat16, not float32" in dequantization.supports(weight, jnp.float32)


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize("size", [(4096, 6144), (1000, 1000), (4096, 128256), (576, 960)], ids=str)
def test_lowers_for(kind, size):
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=128, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    weight = NestedWeight.abstract(*size)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dequantization.supports(weight, jnp.bfloat16) is None
        traced = jax.jit(dequantization.dequantize_to_bfloat16).trace(weight)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
