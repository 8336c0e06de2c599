"""The attention kernel lowers for absent GPUs, and updates the cache in place."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from pallas_kernels import Activations
from pallas_kernels.lanes import device

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the kernel needs jax >= 0.11.2"
)


@pytest.mark.parametrize(
    ("kind", "multiprocessors"), [("NVIDIA H200", 132), ("NVIDIA GeForce RTX 4090", 128)]
)
@pytest.mark.parametrize("name", random_model.shapes())
@pytest.mark.parametrize("paged", [False, True])
def test_lowers_for(kind, multiprocessors, name, paged):
    config = random_model.shape(name)
    all_heads = config.num_heads + 2 * config.num_kv_heads
    sizes = (21, 64) if paged else (2, 512)
    cache = jax.ShapeDtypeStruct((*sizes, config.num_kv_heads, config.head_dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, 8), jnp.int32) if paged else None
    norm = jax.ShapeDtypeStruct((config.head_dim,), jnp.bfloat16)
    arguments = (
        jax.ShapeDtypeStruct((2, 1, all_heads * config.head_dim), jnp.bfloat16),
        (norm, norm) if config.layers[0].attention.head_norms else None,
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
        (cache, cache),
        table,
    )
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.jit(
            lambda qkv, norms, positions, cache, table: attention.attend_heads(
                config,
                config.layers[0].attention,
                Activations.of(qkv),
                norms,
                positions,
                KeyValues(*cache, table),
            ),
            donate_argnums=3,
        )
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    attending, merging = [
        line for line in text.splitlines() if "mosaic_gpu" in line and "custom_call" in line
    ]
    assert attending.count("output_operand_alias<") == 2
    assert merging.count("output_operand_alias<") == 0
