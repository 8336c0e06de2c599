"""The kernels of sampling lower for absent GPUs, and are chosen there."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.penalties import Penalties, TokenHistory
from grinqh_jax.decoding.sampling import Sampling, choose_tokens
from pallas_kernels.lanes import device

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernels need jax >= 0.11.2"
)

VOCABULARY = 151_936


def lowered(kind: str, rows: int, options: dict) -> list[str]:
    """Returns the names of the kernels of ``choose_tokens``."""
    sampling = jax.eval_shape(lambda: Sampling.create(rows, temperature=0.6, top_k=20, top_p=0.95))
    floats = jax.ShapeDtypeStruct((rows,), jnp.float32)
    by_token = jax.ShapeDtypeStruct((rows, VOCABULARY), jnp.float32)
    history = None
    if options.get("penalties"):
        history = TokenHistory(jax.ShapeDtypeStruct(by_token.shape, jnp.int32))
    sampling = Sampling(
        **{
            **vars(sampling),
            "penalties": Penalties(floats, floats, floats) if history else None,
            "logit_bias": by_token if options.get("bias") else None,
            "allowed": jax.ShapeDtypeStruct((rows, VOCABULARY // 32), jnp.uint32)
            if options.get("mask")
            else None,
        }
    )
    tokens = jax.ShapeDtypeStruct((VOCABULARY,), jnp.int32) if options.get("order") else None
    positions = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def run(logits, sampling, positions, history, token_ids):
        order = {"token_ids": token_ids, "in_order": None}
        return choose_tokens(logits, sampling, positions, policy.GPU, history, **order)

    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=128, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(by_token, sampling, positions, history, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(sort|gather|while)", text)
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return [re.search(r"00(\w+)_kernel_mosaic_gpu", call).group(1) for call in calls]


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA GeForce RTX 4090"])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {}),
        (16, {"order": True}),
        (4, {"order": True, "penalties": True, "bias": True}),
        (2, {"penalties": True, "bias": True, "mask": True}),
    ],
)
def test_two_launches_choose_the_tokens(kind, rows, options):
    assert lowered(kind, rows, options) == ["sampling_scores", "sampling_selection"]
