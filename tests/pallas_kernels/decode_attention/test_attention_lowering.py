"""The attention kernels lower for absent GPUs, and update the cache in place."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from marks import slow

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from pallas_kernels import Activations
from pallas_kernels.decode_attention import kernel
from pallas_kernels.lanes import device

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)

GPUS = [
    ("NVIDIA H200", 132),
    ("NVIDIA GeForce RTX 4090", 128),
    ("NVIDIA B200", 148),
    ("NVIDIA GeForce RTX 5090", 170),
]
BATCH = 2


def kernel_calls(gpu, config, spec, tokens: int, paged: bool) -> list[str]:
    """Lowers attention of a layer for a GPU; returns the calls of kernels."""
    kind, multiprocessors = gpu
    all_heads = config.num_heads + 2 * config.num_kv_heads
    sizes = (21, 64) if paged else (BATCH, 512)
    cache = jax.ShapeDtypeStruct((*sizes, config.num_kv_heads, config.head_dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((BATCH, 8), jnp.int32) if paged else None
    norm = jax.ShapeDtypeStruct((config.head_dim,), jnp.bfloat16)
    arguments = (
        jax.ShapeDtypeStruct((BATCH, tokens, all_heads * config.head_dim), jnp.bfloat16),
        (norm, norm) if spec.head_norms else None,
        jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32),
        (cache, cache),
        table,
    )
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.jit(
            lambda qkv, norms, positions, cache, table: attention.attend_heads(
                config, spec, Activations.of(qkv), norms, positions, KeyValues(*cache, table)
            ),
            donate_argnums=3,
        )
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if "mosaic_gpu" in line and "custom_call" in line]


@pytest.mark.parametrize("gpu", [GPUS[0], *slow(*GPUS[1:])], ids=lambda gpu: gpu[0])
@pytest.mark.parametrize("name", random_model.shapes())
@pytest.mark.parametrize("paged", [False, True])
def test_one_token(gpu, name, paged):
    config = random_model.shape(name)
    attending, merging = kernel_calls(gpu, config, config.layers[0].attention, 1, paged)
    assert attending.count("output_operand_alias<") == 2
    assert merging.count("output_operand_alias<") == 0


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("tokens", [4, *slow(1, 16)])
def test_every_option(gpu, head_dim, tokens):
    config = dataclasses.replace(random_model.shape("Qwen3-0.6B"), head_dim=head_dim)
    options = {"window": 128, "score_scale": 0.1, "score_soft_cap": 30.0}
    spec = dataclasses.replace(config.layers[0].attention, **options)
    calls = kernel_calls(gpu, config, spec, tokens, paged=tokens == 4)
    names = ["prepare_attention", "decode_attention", "merge_attention"][-2 if tokens == 1 else -3 :]
    assert len(calls) == len(names)
    for call, name in zip(calls, names, strict=True):
        assert f"{name}_kernel" in call
    assert calls[0].count("output_operand_alias<") == 2
