"""The kernels of a decode step and of a prefill that are lowered for absent GPUs."""

import collections
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from marks import slow

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding import engine, policy
from grinqh_jax.decoding.dial import Dial, DialState, layer_shares
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation.chunk import SlotTexts, speculative_chunk
from grinqh_jax.decoding.speculation.drafter import DrafterState
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.model import decoder
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.output_projection import block_sizes
from pallas_kernels.lanes import device

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2"
)


def lowered(function, name: str, batch: int, *, graded: bool = True) -> str:
    """Returns the StableHLO of ``function(model, tokens, cache, thresholds)`` for a model with two layers."""
    shape = random_model.shape(name)
    config = dataclasses.replace(shape, layers=shape.layers[:2])
    tree = decoder.abstract_tree(config, 8, 3) if graded else random_model.dense_tree(config)
    thresholds = {n: jax.ShapeDtypeStruct((batch, 4), jnp.float32) for n in decoder.linear_names(config)}

    def of_tree(tree, *arguments):
        return function(Decoder.from_tree(config, tree, jnp.bfloat16), *arguments)

    cache = jax.eval_shape(lambda: KVCache.create(config, batch, 256, jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(of_tree, donate_argnums=2).trace(tree, tokens, cache, thresholds)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


NARROW = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
}
"""The shape of SmolLM2-135M, in which the last tiles of ``qkv``, ``o`` and ``down`` are narrow."""


@pytest.mark.parametrize("name", ["Qwen3-8B", "Llama-3.1-8B", "Qwen3-14B", "narrow"])
@pytest.mark.parametrize("batch", [4, *slow(1)])
def test_kernels_of_a_step(name, batch, tmp_path):
    if name == "narrow":
        (tmp_path / "config.json").write_text(json.dumps(NARROW))
        name = str(tmp_path)
    text = lowered(engine.decode_step, name, batch)
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    kernels = collections.Counter(re.search(r"00(\w+)_kernel_mosaic_gpu", call).group(1) for call in calls)
    layers = 2
    assert kernels == {
        "graded_matvec": 4 * layers + len(block_sizes(random_model.shape(name).vocab_size)),
        "decode_attention": layers,
        "merge_attention": layers,
        "add_norm": 2 * layers + 1,
        "swiglu": layers,
    }


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-120b"])
@pytest.mark.parametrize("batch", [1, 4])
def test_kernels_of_a_step_of_a_mixture(name, batch):
    """Two launches compute the products of all chosen experts; no program gathers or copies their planes."""
    text = lowered(engine.decode_step, name, batch)
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    kernels = collections.Counter(re.search(r"00(\w+)_kernel_mosaic_gpu", call).group(1) for call in calls)
    layers = 2
    assert kernels == {
        "graded_matvec": 2 * layers + len(block_sizes(random_model.shape(name).vocab_size)),
        "graded_experts": 2 * layers,
        "decode_attention": layers,
        "merge_attention": layers,
        "add_norm": 2 * layers + 1,
        "router": layers,
        "swiglu_experts": layers,
    }
    of_planes = [line for line in text.splitlines() if "tensor<128x4x" in line and "stablehlo." in line]
    assert all("custom_call @mosaic_gpu" in line for line in of_planes), of_planes
    for operation in ("dot_general", "sort", "top_k", "exponential", "transpose"):
        assert not re.search(rf"\b(stablehlo|chlo)\.{operation}\b", text), operation


def test_a_step_of_an_unquantized_mixture_has_no_loop_over_experts():
    def step(model, tokens, cache, _):
        return engine.decode_step(model, tokens, cache, None)

    text = lowered(step, "Qwen3-30B-A3B", 1, graded=False)
    assert "stablehlo.while" not in text
    for kernel in ("2048x1536", "768x2048"):
        assert re.search(rf"stablehlo.gather.*-> tensor<8x{kernel}xui16>", text)


def test_a_preview_adds_no_kernels_to_prefill():
    """The preview counts graded bits from the inputs; each weight is still dequantized once.

    An H200 dequantizes for prompts of more than 256 tokens (``matmul.tuning``).
    """

    def plain(model, tokens, cache, thresholds):
        return engine.prefill(model, jnp.tile(tokens[:, None], (1, 512)), jnp.full(1, 500), cache)

    def previewed(model, tokens, cache, thresholds):
        block = jnp.tile(tokens[:, None], (1, 512))
        return engine.prefill_with_preview(model, block, jnp.full(1, 500), cache, thresholds)

    kernels = [
        re.findall(r"00(\w+)_kernel_mosaic_gpu", lowered(function, "Qwen3-8B", 1))
        for function in (plain, previewed)
    ]
    assert collections.Counter(kernels[0]) == collections.Counter(kernels[1])
    assert sum("dequant" in name for name in kernels[0]) == 4 * 2


def dial_of_zeros(config, batch: int) -> Dial:
    names, state = tuple(decoder.linear_names(config)), DialState.create(jnp.zeros(batch))
    shares = jnp.asarray(layer_shares(config), jnp.float32)
    return Dial(jnp.zeros((29, len(names), 4)), jnp.linspace(1.0, 8.0, 29), shares, state, names)


@pytest.mark.parametrize("batch", [4, *slow(1)])
def test_the_dial_adds_one_reduction_and_no_branch_to_decoding(batch):
    """A branch would force a host sync at every step, and XLA makes a kernel for every reduction."""

    def chunk(use_dial, model, tokens, cache, thresholds):
        done, stop, limits = jnp.zeros(batch, bool), jnp.full(1, -1), jnp.full(batch, 8)
        dial = dial_of_zeros(model.config, batch) if use_dial else thresholds
        return engine.decode_chunk(
            model, tokens, done, cache, dial, Sampling.create(batch), stop, limits, steps=8, policy=policy.GPU
        )

    fixed, turned = (lowered(functools.partial(chunk, use), "Qwen3-8B", batch) for use in (False, True))
    for operation in ("while", "case", "if", "dot_general", "custom_call", "sort"):
        counts = [len(re.findall(rf"stablehlo\.{operation}\b", text)) for text in (fixed, turned)]
        assert counts[0] == counts[1], operation
    counts = [len(re.findall(r"stablehlo\.reduce\b", text)) for text in (fixed, turned)]
    assert counts[1] == counts[0] + 1  # over the layers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_choice_gathers_logits_in_the_order_of_the_tokens(temperature):
    """Greedy choice and sampling use the logits in the order of the output projection."""

    def chunk(model, tokens, cache, thresholds):
        done, stop, limits = jnp.zeros(1, bool), jnp.full(1, -1), jnp.full(1, 8)
        sampling = Sampling.create(1, temperature=temperature)
        return engine.decode_chunk(
            model, tokens, done, cache, thresholds, sampling, stop, limits, steps=8, policy=policy.GPU
        )

    vocabulary = random_model.shape("Qwen3-8B").vocab_size
    text = lowered(chunk, "Qwen3-8B", 1)
    assert not re.search(rf"stablehlo\.gather.*-> tensor<1x{vocabulary}xf32>", text)
    assert not re.search(r"stablehlo\.sort", text)
    sampled = ["sampling_scores", "sampling_selection"] if temperature else []
    assert re.findall(r"00(sampling_\w+)_kernel_mosaic_gpu", text) == sampled


VERIFICATIONS = [("Qwen3-8B", 1, 1), ("Qwen3-8B", 4, 3), ("Qwen3-8B", 8, 1), ("Qwen3-30B-A3B", 1, 7)]


@pytest.mark.parametrize("case", [("Qwen3-8B", 1, 7), *slow(*VERIFICATIONS)], ids=str)
def test_a_verification_launches_the_kernels_of_a_step(case):
    """Drafts add rows to products and positions to attention, and one launch that prepares the positions.

    If no text has a draft, a branch launches the kernels of a plain step.
    """
    name, texts, drafts = case

    def chunk(model, tokens, cache, thresholds, *, speculates):
        limits, options = jnp.full(texts, 8), {"steps": 8, "policy": policy.GPU}
        dial = dial_of_zeros(model.config, texts)
        rest = Sampling.create(texts), jnp.full(1, -1), limits
        done = jnp.zeros(texts, bool)
        if not speculates:
            return engine.decode_chunk(model, tokens, done, cache, dial, *rest, **options)
        so_far = SlotTexts(jnp.zeros((texts, 256), jnp.int32), jnp.zeros((texts, 4)))
        drafter = PromptLookup(), DrafterState(), jnp.full(texts, drafts)
        return speculative_chunk(
            model, tokens, done, cache, dial, *rest, so_far, *drafter, drafts=drafts, **options
        )

    plain, verified = (
        lowered(functools.partial(chunk, speculates=speculates), name, texts) for speculates in (False, True)
    )
    kernels = [
        collections.Counter(re.findall(r"00(\w+)_kernel_mosaic_gpu", text)) for text in (plain, verified)
    ]
    layers = 2
    assert kernels[1] == kernels[0] + kernels[0] + collections.Counter(prepare_attention=layers)
    assert len(re.findall(r"\bstablehlo\.(?:case|if)\b", verified)) == 1
    for operation in ("dot_general", "sort"):
        assert not re.search(rf"\bstablehlo\.{operation}\b", verified), operation
