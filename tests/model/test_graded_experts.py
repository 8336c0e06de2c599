"""Products of rows with graded experts as a GPU computes them: one launch for all experts, then batches."""

import emulated_launch
import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
from jax.sharding import AxisType

from grinqh_jax.model import expert_products
from grinqh_jax.model.experts import ChosenGraded
from pallas_kernels.dequantization import kernel as dequantization
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.lanes import device

NUM_EXPERTS, IN, OUT = 4, 130, 312


def experts_weight(num_experts, in_features, out_features):
    rng = np.random.default_rng(0)
    k, n = matvec_oracle.padded_shape(in_features, out_features)
    words = rng.integers(0, 2**32, (num_experts, 4, k, n // matvec_oracle.WORD_OUTPUTS), np.uint32)
    scales = rng.uniform(0.01, 0.1, (num_experts, k // matvec_oracle.GROUP, n)).astype(np.float16)
    gains = np.array([0.8, 0.9, 1.1, 1], np.float32)
    return NestedExperts(*map(jnp.asarray, (words, scales)), in_features, out_features, jnp.asarray(gains))


def exact(weight, x, experts, level):
    """Returns products in float64 with the weights of a level rounded to bfloat16."""
    gain, x, experts = (
        np.float64(weight.level_gains[level - 1]),
        np.asarray(x, np.float64),
        np.asarray(experts),
    )
    y = np.zeros((*experts.shape, weight.out_features))
    for expert in np.unique(experts):
        one = matvec_oracle.dequantize(jax.tree.map(np.asarray, weight.expert(int(expert))), level) / gain
        rows = experts == expert
        y[rows] = gain * (x[rows] @ one.astype(jnp.bfloat16).astype(np.float64))
    return y


@pytest.fixture
def launches(monkeypatch):
    """Runs the kernel on the emulator; returns the names of its launches."""
    names = []

    def lane_kernel(name, *arguments, **options):
        names.append(name)
        return emulated_launch.lane_kernel(name, *arguments, **options)

    monkeypatch.setattr(device, "unsupported_reason", lambda *oldest: None)
    monkeypatch.setattr(dequantization, "lane_kernel", lane_kernel)
    dequantization._dequantization_kernel.cache_clear()
    yield names
    dequantization._dequantization_kernel.cache_clear()


@pytest.mark.parametrize("capacity", [2, 16])
@pytest.mark.parametrize("level", [None, 2, 3])
def test_products_equal_those_of_each_expert(launches, monkeypatch, level, capacity):
    """Expert 1 has most rows and expert 2 none. None is full precision."""
    monkeypatch.setattr(expert_products, "batch_rows", lambda rows, num_experts: capacity)
    weight = experts_weight(NUM_EXPERTS, IN, OUT)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 2, IN)), jnp.bfloat16)
    experts = jnp.asarray([[[1, 0], [1, 3]], [[1, 0], [0, 1]], [[1, 3], [1, 0]]])
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, 2, OUT)), jnp.float32)
    layer = ChosenGraded(weight, experts, bias)
    y = layer.dense(x, jnp.float32) if level is None else layer.at_level(x, level, jnp.float32)
    expected = exact(weight, x, experts, level or 4) + np.asarray(bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert launches == ["dequantization_kernel"]


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize("size", [(128, 2048, 1536), (128, 768, 2048), (128, 2880, 5760)], ids=str)
def test_a_gpu_has_two_launches_for_all_experts_and_no_copies(size):
    """One dequantizes, the other multiplies. A loop would take one expert after another. Shapes are those of
    Qwen3-30B-A3B and gpt-oss-120b."""
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    x = jax.ShapeDtypeStruct((64, 8, size[1]), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        product = jax.jit(lambda weight, experts, x: ChosenGraded(weight, experts).dense(x))
        traced = product.trace(NestedExperts.abstract(*size), jax.ShapeDtypeStruct((64, 8), jnp.int32), x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "stablehlo.dynamic_slice" not in text
