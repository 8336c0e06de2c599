"""Layers of all families on the kernels of decode attention, emulated, against XLA."""

import dataclasses

import emulated_launch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from marks import slow

from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.ring_cache import RingKeyValues, ring_slots
from pallas_kernels import Activations, decode_attention
from pallas_kernels.decode_attention import kernel

BATCH, CAPACITY, PAGE_SIZE = 2, 48, 8
LENGTHS = (17, 40)
QWEN3 = "qwen3-biases-window"


@pytest.fixture
def emulated(monkeypatch):
    """Replaces the launches; returns a list that gets the keyword arguments of each call."""
    calls, real = [], kernel.decode_attention
    builders = (kernel._prepare_kernel, kernel._attention_kernel, kernel._merge_kernel)

    def recorded(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(kernel, "BLOCKS", 8)  # Fewer splits are emulated faster.
    monkeypatch.setattr(kernel, "lane_kernel", emulated_launch.lane_kernel)
    monkeypatch.setattr(decode_attention, "supports", lambda **sizes: None)
    monkeypatch.setattr(decode_attention, "decode_attention", recorded)
    for build in builders:
        build.cache_clear()
    yield calls
    for build in builders:
        build.cache_clear()


def arguments(config, spec, tokens: int, paged: bool):
    """Returns the arguments of ``attend_heads`` after the description of the layer."""
    rng, dim = np.random.default_rng(tokens), config.head_dim
    kv_heads, heads = config.num_kv_heads, config.num_heads + 2 * config.num_kv_heads

    def normal(*size):
        return jnp.asarray(rng.standard_normal(size), jnp.bfloat16)

    sizes, pages = (BATCH, CAPACITY), None
    if paged:
        count = BATCH * CAPACITY // PAGE_SIZE
        sizes, pages = (count, PAGE_SIZE), jnp.asarray(rng.permutation(count).reshape(BATCH, -1), jnp.int32)
    cache = KeyValues(*(normal(*sizes, kv_heads, dim) for _ in range(2)), pages)
    norms = None
    if spec.head_norms is not None:
        widths = {"head": (dim, dim), "query": (config.num_heads * dim, kv_heads * dim)}
        norms = tuple(1 + 0.2 * normal(width) for width in widths[spec.head_norms[0].axis])
    positions = jnp.asarray(LENGTHS)[:, None] + jnp.arange(tokens)
    return Activations.of(normal(BATCH, tokens, heads * dim)), norms, positions, cache


def config_of(name: str) -> ModelConfig:
    """Returns a configuration with heads of a size that the programs take, at most twice that of the case."""
    config = ModelConfig.from_hf(CASES[name])
    return dataclasses.replace(config, head_dim=-(-config.head_dim // 16) * 16)


def by_xla(config, spec, *inputs):
    """Attends in one program, which cannot contain an emulated launch."""
    return jax.jit(lambda inputs: attention.attend_heads(config, spec, *inputs))(inputs)


contiguous = jax.jit(KeyValues.contiguous)


def check_layer(emulated, config, spec, tokens: int, paged: bool) -> None:
    inputs = arguments(config, spec, tokens, paged)
    if spec.sinks:
        inputs += None, jnp.asarray(np.random.default_rng(3).standard_normal(config.num_heads), jnp.float32)
    outputs, cache = attention.attend_heads(config, spec, *inputs)
    assert emulated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "supports", lambda **sizes: "switched off")
        expected, expected_cache = by_xla(config, spec, *inputs)
    got, wanted = (np.asarray(x.array, np.float32) for x in (outputs, expected))
    assert np.linalg.norm(got - wanted) <= 1e-2 * np.linalg.norm(wanted)
    rows = [
        [np.asarray(array, np.float32) for array in contiguous(both, jnp.full(BATCH, CAPACITY))[:2]]
        for both in (cache, expected_cache)
    ]
    for row, length in enumerate(LENGTHS):  # XLA clears the slots after the new tokens.
        used = ([array[row, : length + tokens] for array in arrays] for arrays in rows)
        np.testing.assert_allclose(*used, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "gpt_oss",
        QWEN3,
        *slow("granite", "ministral3", "olmo3-window-yarn", "phi3-partial-window", "smollm3"),
    ],
)
@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_layers_of_every_family(emulated, name, tokens):
    config = config_of(name)
    for spec in {layer.attention for layer in config.layers}:
        check_layer(emulated, config, spec, tokens, paged=tokens == 3)
    windows = {layer.attention.window for layer in config.layers}
    assert {options["window"] for options in emulated} == windows


def test_a_soft_cap_and_a_scale(emulated):
    config = config_of(QWEN3)
    spec = dataclasses.replace(config.layers[0].attention, score_soft_cap=3.0, score_scale=0.4, window=9)
    check_layer(emulated, config, spec, 2, paged=False)


def test_a_ring(emulated):
    """A layer with a window keeps its last positions only."""
    config = config_of("gemma3")
    spec = next(layer.attention for layer in config.layers if layer.attention.window)
    qkv, norms, positions, cache = arguments(config, spec, 3, paged=False)
    slots = ring_slots(spec.window)
    last = jnp.asarray(LENGTHS)[:, None] - 1
    kept = last - (last - jnp.arange(slots)) % slots  # the position of each slot
    of_slots = (jnp.take_along_axis(a, jnp.maximum(kept, 0)[..., None, None], axis=1) for a in cache[:2])
    ring = RingKeyValues(*of_slots)
    outputs, updated = attention.attend_heads(config, spec, qkv, norms, positions, ring)
    expected, _ = attention.attend_heads(config, spec, qkv, norms, positions, cache)
    np.testing.assert_array_equal(outputs.array, expected.array)
    assert len(emulated) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "supports", lambda **sizes: "switched off")
        _, expected = by_xla(config, spec, qkv, norms, positions, ring)
    for got, wanted in zip(updated[:2], expected[:2], strict=True):
        both = (np.asarray(array, np.float32) for array in (got, wanted))
        np.testing.assert_allclose(*both, rtol=2**-7, atol=2**-5)


def test_a_prompt_longer_than_a_step_is_left_to_xla(monkeypatch):
    """17 tokens are read by XLA's operations."""
    config = config_of(QWEN3)
    spec = config.layers[0].attention
    monkeypatch.setattr(kernel.device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(decode_attention, "decode_attention", lambda *_, **__: pytest.fail("kernel"))
    config = dataclasses.replace(config, head_dim=64)
    outputs, _ = by_xla(config, spec, *arguments(config, spec, 17, False))
    assert outputs.array.shape == (BATCH, 17, config.num_heads * 64)
