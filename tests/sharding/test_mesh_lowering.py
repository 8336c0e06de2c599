"""The kernels of a decode step on a mesh, lowered for absent GPUs."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from jax.sharding import AxisType, PartitionSpec

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation.chunk import SlotTexts, speculative_chunk
from grinqh_jax.decoding.speculation.drafter import DrafterState
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.model_drafter import SelfDrafter
from grinqh_jax.decoding.thresholds import StackedThresholds
from grinqh_jax.model import decoder
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.output_projection import block_sizes
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding.cutting import cut_leaves
from grinqh_jax.sharding.rules import partition
from pallas_kernels.lanes import device

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2"
)
LAYERS = 2
CAPACITY = 256


def lowered(function, name, devices, batch, exchange="sum"):
    """Returns the StableHLO of ``function(model, tokens, cache, thresholds)`` for a cut model."""
    shape = random_model.shape(name)
    config = dataclasses.replace(shape, layers=shape.layers[:LAYERS])
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((devices,), (AXIS,), (AxisType.Auto,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        cut = partition(config, mesh, exchange)
    leaves = cut_leaves(config, traverse_util.flatten_dict(decoder.abstract_tree(config, 8, 3), sep="."), cut)
    heads = dataclasses.replace(config, num_kv_heads=cut.local.num_kv_heads * devices)
    cache = jax.eval_shape(lambda: KVCache.create(heads, batch, CAPACITY, jnp.bfloat16))
    thresholds = {n: jax.ShapeDtypeStruct((batch, 4), jnp.float32) for n in decoder.linear_names(config)}
    whole, cached = PartitionSpec(), cache.partition_specs()

    def step(leaves, *arguments):
        tree = traverse_util.unflatten_dict(leaves, sep=".")
        return function(Decoder.from_tree(config, tree, jnp.bfloat16, cut), *arguments)

    specs = {leaf_name: leaf.sharding.spec for leaf_name, leaf in leaves.items()}
    on_mesh = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, whole, cached, whole),
        out_specs=(whole, cached, whole),
        check_vma=False,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(on_mesh, donate_argnums=2).trace(
            leaves, jax.ShapeDtypeStruct((batch,), jnp.int32), cache, thresholds
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "devices", "batch"), [("Qwen3-8B", 2, 1), ("Llama-3.1-70B", 4, 8), ("Qwen3-8B", 8, 1)]
)
def test_every_device_runs_the_kernels_of_a_step(name, devices, batch):
    """A block exchanges once; the statistics of all layers and the logits are two more exchanges."""
    text = lowered(engine.decode_step, name, devices, batch)
    kernels = collections.Counter(re.findall(r"00(\w+)_kernel_mosaic_gpu", text))
    assert kernels == {
        "graded_matvec": 4 * LAYERS + len(block_sizes(random_model.shape(name).vocab_size)),
        "decode_attention": LAYERS,
        "merge_attention": LAYERS,
        "add_norm": 2 * LAYERS + 1,
        "swiglu": LAYERS,
    }
    assert len(re.findall(r"stablehlo\.all_reduce", text)) == 2 * LAYERS
    assert len(re.findall(r"stablehlo\.all_gather", text)) == 2


def test_one_kernel_exchanges_and_norms():
    """The collectives that remain exchange statistics and logits."""

    def step(model, tokens, cache, thresholds):
        cache = dataclasses.replace(cache, mailbox=model.partition.opened(len(tokens)))
        logits, cache, stats = engine.decode_step(model, tokens, cache, thresholds)
        return logits, dataclasses.replace(cache, mailbox=None), stats

    text = lowered(step, "Qwen3-8B", 2, 8, "kernel")
    kernels = collections.Counter(re.findall(r"00(\w+)_kernel_mosaic_gpu", text))
    assert (kernels["exchange_add_norm"], kernels["open_mailbox"]) == (2 * LAYERS, 1)
    assert (kernels["exchange"], kernels["add_norm"]) == (0, 1)  # The first norm follows no exchange.
    assert not re.findall(r"stablehlo\.all_reduce", text)
    assert len(re.findall(r"stablehlo\.all_gather", text)) == 2


@pytest.mark.parametrize(("drafter", "steps"), [("lookup", 1), ("self", 2)])
def test_a_step_with_drafts_exchanges_as_one_without(drafter, steps):
    """So the texts are equal. A step has 16 rows; ``self`` also reads the 2 last tokens."""
    batch, drafts = 2, 7

    def chunk(model, tokens, cache, thresholds):
        drafters = {
            "lookup": PromptLookup(),
            "self": SelfDrafter(
                StackedThresholds(jnp.stack([t[0] for t in thresholds.values()]), tuple(thresholds))
            ),
        }
        texts = SlotTexts(jnp.zeros((batch, CAPACITY), jnp.int32), jnp.zeros((batch, 4)))
        full = jnp.full(batch, drafts)
        decoded, cache, *_ = speculative_chunk(
            model,
            tokens,
            jnp.zeros(batch, bool),
            cache,
            thresholds,
            Sampling.create(batch),
            jnp.full(1, -1),
            full,
            texts,
            drafters[drafter],
            DrafterState(),
            full,
            steps=4,
            drafts=drafts,
            policy=DecodePolicy.for_device(),
        )
        return decoded.tokens, cache, decoded.grading_stats

    text = lowered(chunk, "Qwen3-8B", 2, batch, "kernel")
    kernels = collections.Counter(re.findall(r"00(\w+)_kernel_mosaic_gpu", text))
    assert (kernels["exchange_add_norm"], kernels["open_mailbox"]) == (2 * LAYERS * steps, 1)
    assert (kernels["exchange"], kernels["add_norm"]) == (0, steps)
    assert not re.findall(r"stablehlo\.all_reduce", text)


def test_a_long_prefill_dequantizes_the_parts():
    """An H200 dequantizes for prompts of more than 256 tokens (``matmul.tuning``)."""

    def prefill(model, tokens, cache, thresholds):
        logits, cache = engine.prefill(model, jnp.tile(tokens[:, None], (1, 512)), jnp.full(1, 500), cache)
        return logits, cache, thresholds

    kernels = re.findall(r"00(\w+)_kernel_mosaic_gpu", lowered(prefill, "Qwen3-8B", 2, 1))
    assert sum("dequant" in name for name in kernels) == 4 * LAYERS
