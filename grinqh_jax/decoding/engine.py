"""The functional core: prefill and decoding as pure functions on pytrees.

A serving stack may call these without anything above them. Whatever a request sets (bits, sampling,
stop tokens, limits) is an array; only shapes, ``steps`` and whether a batch draws at all (``Sampling.draws``)
are static, so a changed request compiles nothing. Caches are donated: use the returned one.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, drawn, likeliest
from grinqh_jax.decoding.thresholds import StackedThresholds
from grinqh_jax.model import apply
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel
from pallas_kernels import Activations, GradingStats
from pallas_kernels.layout import DIGIT_BITS

PREVIEW_TOKENS = 64
"""Of a prompt's block so many tokens, the last, say how much graded reading of its text takes."""

SKIPPED_POSITIONS = 4
"""The first positions of a text, which say nothing of how much is read of others.

Attention dumps what it does not need on the first tokens of whatever it sees, and their activations
are unlike all others: a few channels hundreds of times the usual, the rest small. In real decoding they
occur once in a conversation and nearly always in the prompt, which is not graded.
"""

Thresholds = Mapping[str, Float[Array, "b p"]]
"""Thresholds of every row of the batch, by the linear layer's name. ``thresholds.StackedThresholds`` is one
that a call hands over as a single array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grades:
    """What graded decoding really read; the last axis runs over ``decoder.linear_names``.

    Attributes:
      bits: float32 ``[..., linears]``, mean bits read per weight, scales (0.125 bits) not counted.
      activation_range_ratio: float32 ``[..., linears]``, largest ``|x|`` over the largest met in calibration.
    """

    bits: Float[Array, "*steps linears"]
    activation_range_ratio: Float[Array, "*steps linears"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one ``decode_chunk`` generated.

    Attributes:
      tokens: int32 ``[B, steps]``; row b holds ``counts[b]`` new tokens, then padding.
      counts: int32 ``[B]``.
      last: int32 ``[B]``, the last token of every row, which the model has not read yet.
      done: bool ``[B]``, rows that met a stop token, their limit or the end of the cache.
      grades: of each step, ``[steps, B, linears]``, valid as far as the tokens; None for dense models.
    """

    tokens: Int[Array, "b steps"]
    counts: Int[Array, "b"]
    last: Int[Array, "b"]
    done: Bool[Array, "b"]
    grades: Grades | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preview:
    """What graded reading of a prompt would have taken.

    Attributes:
      bits: float32 ``[B, PREVIEW_TOKENS, linears]`` (as ``Grades.bits``), of row b's first ``counts[b]``.
      counts: int32 ``[B]``, tokens looked at.
    """

    bits: Float[Array, "b s linears"]
    counts: Int[Array, "b"]


@jax.jit(donate_argnames="cache")
def prefill(
    model: Decoder | FlatModel, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], cache: KVCache
) -> tuple[Float[Array, "b v"], KVCache]:
    """Reads new tokens at full precision, in one pass.

    Args:
      model: dense or graded.
      tokens: right-padded with any valid token.
      lengths: new tokens of each row, at most t, and no more than the cache has room for.
      cache: of the earlier tokens; a long prompt may come in several calls.

    Returns:
      float32 logits that follow each row's last new token (meaningless for a row without any), and
      the cache.
    """
    logits, _, cache = _prefill(_module(model), tokens, lengths, cache, apply.Dense())
    return logits, cache


@jax.jit(donate_argnames="cache")
def prefill_with_preview(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds,
) -> tuple[Float[Array, "b v"], KVCache, Preview]:
    """``prefill``, which also finds out what thresholds would make of the text.

    Args:
      model: graded.
      tokens, lengths, cache: as in ``prefill``.
      thresholds: as in ``decode_step``.

    Returns:
      Logits and cache as ``prefill``, and the preview of each row's last new tokens.

    Raises:
      ValueError: the model is dense.
    """
    model = _module(model)
    if not model.graded:
        raise ValueError("a dense model has nothing to preview; use prefill")
    start = jnp.maximum(jnp.maximum(lengths - PREVIEW_TOKENS, SKIPPED_POSITIONS - cache.lengths), 0)
    positions = jnp.minimum(start[:, None] + jnp.arange(PREVIEW_TOKENS), tokens.shape[1] - 1)
    strategy = apply.Previewing(thresholds, positions)
    logits, x, cache = _prefill(model, tokens, lengths, cache, strategy)
    for name in model.lm_head.names:
        strategy.look(name, x)
    found = strategy.bits
    bits = jnp.stack([found[name] for name in linear_names(model.config)], axis=-1)
    return logits, cache, Preview(bits, jnp.maximum(lengths - start, 0))


@jax.jit
def merge_previews(earlier: Preview, later: Preview) -> Preview:
    """Of each row the preview that looked at more tokens, the later one if both looked at as many."""
    take = later.counts >= earlier.counts
    bits = jnp.where(take[:, None, None], later.bits, earlier.bits)
    return Preview(bits, jnp.where(take, later.counts, earlier.counts))


def _prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array, cache: KVCache, strategy: apply.Dense
) -> tuple[Float[Array, "b v"], Float[Array, "b t d"], KVCache]:
    """Logits as ``prefill``, the hidden states that all could come from, and the cache."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, layers = model.hidden(tokens, positions, strategy, cache.layers)
    x = hidden.array
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    of_last = apply.Dense()
    if model.graded:  # the head at its full bits; dequantized it would be the largest array of all
        read_all = jnp.zeros(model.full_bits // DIGIT_BITS, jnp.float32)
        of_last = apply.Graded(dict.fromkeys(model.lm_head.names, read_all))
    return model.logits(Activations.of(last), of_last), x, cache.updated(layers, cache.lengths + lengths)


def decode_step(
    model: Decoder,
    tokens: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    active: Bool[Array, "b"] | None = None,
) -> tuple[Float[Array, "b v"], KVCache, Grades | None]:
    """Reads one token of every row, graded.

    Args:
      model: graded; or dense, with ``thresholds=None``.
      tokens: one per row.
      cache: of the earlier tokens.
      thresholds: by layer name.
      active: rows that advance (all by default). The others stay as they are; their logits mean
        nothing.

    Returns:
      float32 logits of the next token, the cache, and grades ``[B, linears]`` (None if dense).
    """
    outputs, cache, reading = _step(model, tokens, cache, thresholds, active)
    return model.lm_head.in_order(outputs), cache, _grades(model, reading)


def _step(model, tokens, cache, thresholds, active):
    """``decode_step`` with logits in the order of the output projection's outputs, and, in place of grades,
    the reading of ``[B, linears]``."""
    strategy = apply.Dense() if thresholds is None else apply.Graded(thresholds)
    x, layers = model.hidden(tokens[:, None], cache.lengths[:, None], strategy, cache.layers)
    outputs = model.lm_head.outputs(x, strategy)[:, 0]
    advance = jnp.ones_like(cache.lengths) if active is None else active.astype(jnp.int32)
    cache = cache.updated(layers, cache.lengths + advance)
    if thresholds is None:
        return outputs, cache, None
    return outputs, cache, _by_linear(model, strategy.stats)


def decode_chunk(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b"],
    done: Bool[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    sampling: Sampling,
    stop_tokens: Int[Array, "e"],
    limits: Int[Array, "b"],
    *,
    steps: int,
    policy: DecodePolicy | None = None,
) -> tuple[Chunk, KVCache]:
    """Generates up to ``steps`` tokens per row without leaving the device.

    Always runs ``steps`` steps on a GPU; an early exit would force a host sync. So the call returns while the
    device is at work, and the next chunk can be launched before this one has ended.

    Args:
      model: graded; or dense, with ``thresholds=None``.
      tokens: Last token of each row, not yet in the cache.
      done: Rows to leave alone.
      cache: Keys and values of the tokens before those. Donated.
      thresholds: Thresholds of each row, by layer name.
      sampling: How tokens are chosen.
      stop_tokens: A row is done when it generates one of these, which is still returned.
      limits: Number of tokens that each row may generate in this call.
      steps: Number of tokens that the result has room for.
      policy: How the loop is compiled, by default ``DecodePolicy.for_device()``.
    """
    policy = policy or DecodePolicy.for_device()
    return jitted_decode_chunk(
        model, tokens, done, cache, thresholds, sampling, stop_tokens, limits, steps=steps, policy=policy
    )


@jax.jit(static_argnames=("steps", "policy"), donate_argnames="cache")
def jitted_decode_chunk(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b"],
    done: Bool[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    sampling: Sampling,
    stop_tokens: Int[Array, "e"],
    limits: Int[Array, "b"],
    *,
    steps: int,
    policy: DecodePolicy,
) -> tuple[Chunk, KVCache]:
    """The program behind ``decode_chunk``, for callers that lower or compile it themselves."""
    model = _module(model)
    if isinstance(thresholds, StackedThresholds):
        thresholds = thresholds.by_name()  # before the loop, not in it
    batch, linears = len(tokens), len(linear_names(model.config))
    done |= (limits <= 0) | (cache.lengths >= cache.capacity)
    readings = (
        None if thresholds is None else GradingStats(jnp.zeros((steps, batch, linears, 2), jnp.float32))
    )
    start = Chunk(jnp.zeros((batch, steps), jnp.int32), jnp.zeros(batch, jnp.int32), tokens, done, None)

    tokens_of_outputs = model.lm_head.tokens()  # made here, not in the loop

    def choose(outputs, positions):
        if sampling.draws:
            return drawn(model.lm_head.in_order(outputs), sampling, positions, policy)
        return likeliest(outputs, tokens_of_outputs)

    def unfinished(state):
        step, chunk, *_ = state
        return (step < steps) & ~jnp.all(chunk.done)

    def generate_one(state):
        step, chunk, readings, cache = state
        active = ~chunk.done
        outputs, cache, reading = _step(model, chunk.last, cache, thresholds, active)
        token = jnp.where(active, choose(outputs, cache.lengths), chunk.last)
        counts = chunk.counts + active
        stopped = jnp.any(token[:, None] == stop_tokens, axis=-1)
        done = chunk.done | stopped | (counts >= limits) | (cache.lengths >= cache.capacity)
        chunk = Chunk(
            tokens=chunk.tokens.at[:, step].set(token),
            counts=counts,
            last=token,
            done=done,
            grades=None,  # of all steps, behind the loop
        )
        readings = jax.tree.map(lambda kept, new: kept.at[step].set(new), readings, reading)
        return step + 1, chunk, readings, cache

    state = 0, start, readings, cache
    if policy.early_exit:
        state = jax.lax.while_loop(unfinished, generate_one, state)
    else:
        state = jax.lax.fori_loop(0, steps, lambda _, state: generate_one(state), state)
    _, chunk, readings, cache = state
    return dataclasses.replace(chunk, grades=_grades(model, readings)), cache


def _module(model: Decoder | FlatModel) -> Decoder:
    return model.module if isinstance(model, FlatModel) else model


@jax.named_scope("grades")
def _by_linear(model: Decoder, readings: Mapping[str, GradingStats]) -> GradingStats:
    """Those of one position of every row, ``[B, linears]``."""
    numbers = [readings[name].packed.reshape(-1, 2) for name in linear_names(model.config)]
    return GradingStats(jnp.stack(numbers, axis=1))


@jax.named_scope("grades")
def _grades(model: Decoder, reading: GradingStats | None) -> Grades | None:
    if reading is None:
        return None
    calibrated = [model.linear(name).max_activation[...] for name in linear_names(model.config)]
    return Grades(reading.bits, reading.max_abs / jnp.stack(calibrated))
