"""The functional core: prefill and decoding as pure functions on pytrees.

A serving stack can call these functions directly. The settings of a request (bits, sampling parameters, stop
tokens, limits) are arrays. Only shapes, ``steps``, the ``DecodePolicy``, ``Sampling.greedy`` and the presence
of penalties are static, so a changed request compiles nothing. Caches are donated: use the returned one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.dial import SKIPPED_POSITIONS, Dial, DialState
from grinqh_jax.decoding.logprobs import TokenLogprobs, token_logprobs
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, choose_tokens
from grinqh_jax.decoding.thresholds import StackedThresholds, Thresholds, interpolate_each
from grinqh_jax.model import apply
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh
from pallas_kernels import Activations, GradingStats
from pallas_kernels.layout import DIGIT_BITS

PREVIEW_TOKENS = 64
"""Number of trailing prompt tokens used to estimate graded bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Result of ``decode_chunk``.

    Attributes:
      tokens: int32 ``[B, steps]``; row b holds ``counts[b]`` new tokens, then padding.
      counts: int32 ``[B]``, number of new tokens of each row.
      last: int32 ``[B]``, last token of each row, not yet in the cache.
      done: bool ``[B]``, rows that met a stop token, their limit or the end of the cache.
      grading_stats: ``[steps, B, linears]``, layers in the order of ``decoder.linear_names``; row b is valid
        for ``counts[b]`` steps. None for dense models.
      history: Tokens that each row has after the chunk; None without penalties.
      dial: The dial after these tokens; None if no dial set the thresholds.
      logprobs: Log-probabilities ``[steps, B]`` of the new tokens and of the most likely ones; None without
        ``top_logprobs``.
    """

    tokens: Int[Array, "b steps"]
    counts: Int[Array, "b"]
    last: Int[Array, "b"]
    done: Bool[Array, "b"]
    grading_stats: GradingStats | None
    history: TokenHistory | None = None
    dial: DialState | None = None
    logprobs: TokenLogprobs | None = None

    @classmethod
    def empty(
        cls,
        last: Int[Array, "b"],
        done: Bool[Array, "b"],
        room: int,
        linears: int | None,
        history: TokenHistory | None,
        dial: Dial | None,
        top_logprobs: int | None,
    ) -> "Chunk":
        """Returns a chunk without tokens.

        Args:
          last, done, history, dial, top_logprobs: As in ``decode_chunk``.
          room: Largest number of tokens of a row.
          linears: Number of graded linear layers; None for a dense model.
        """
        batch = len(last)
        return cls(
            tokens=jnp.zeros((batch, room), jnp.int32),
            counts=jnp.zeros(batch, jnp.int32),
            last=last,
            done=done,
            grading_stats=None
            if linears is None
            else GradingStats(jnp.zeros((room, batch, linears, 2), jnp.float32)),
            history=history,
            dial=None if dial is None else dial.state,
            logprobs=None if top_logprobs is None else TokenLogprobs.zeros(room, batch, top_logprobs),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preview:
    """Bits that graded decoding would have read for the last tokens of a prompt.

    Attributes:
      bits: float32 ``[B, PREVIEW_TOKENS, linears]``, mean bits per weight, scales (0.125 bits) not counted;
        row b is valid for its first ``counts[b]`` tokens.
      counts: int32 ``[B]``, number of valid tokens of each row.
    """

    bits: Float[Array, "b s linears"]
    counts: Int[Array, "b"]


@jax.jit(donate_argnames="cache")
@on_mesh
def prefill(
    model: Decoder | FlatModel, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], cache: KVCache
) -> tuple[Float[Array, "b v"], KVCache]:
    """Reads new tokens at full precision, in one pass.

    Args:
      model: Dense or graded model.
      tokens: New tokens, right-padded with any valid token.
      lengths: Number of new tokens of each row, at most t and at most the free slots of the cache.
      cache: Keys and values of the earlier tokens. A long prompt may come in several calls.

    Returns:
      float32 logits after the last new token of each row (undefined for a row without new tokens), and the
      cache.
    """
    logits, _, cache = _prefill(decoder_of(model), tokens, lengths, cache, apply.Dense())
    return logits, cache


@jax.jit(donate_argnames="cache")
@on_mesh
def prefill_with_preview(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds,
) -> tuple[Float[Array, "b v"], KVCache, Preview]:
    """Runs ``prefill`` and counts the bits that graded decoding would have read.

    Args:
      model: Graded model.
      tokens, lengths, cache: As in ``prefill``.
      thresholds: Thresholds of each row, by layer name.

    Returns:
      Logits and cache as ``prefill`` does, and the preview of the last new tokens of each row.

    Raises:
      ValueError: The model is dense.
    """
    model = decoder_of(model)
    if not model.graded:
        raise ValueError("a dense model has nothing to preview; use prefill")
    start = jnp.maximum(jnp.maximum(lengths - PREVIEW_TOKENS, SKIPPED_POSITIONS - cache.lengths), 0)
    positions = jnp.minimum(start[:, None] + jnp.arange(PREVIEW_TOKENS), tokens.shape[1] - 1)
    strategy = apply.Previewing(thresholds, positions)
    logits, x, cache = _prefill(model, tokens, lengths, cache, strategy)
    for name in model.lm_head.names:
        strategy.observe(name, x)
    by_name = strategy.bits
    bits = jnp.stack([by_name[name] for name in linear_names(model.config)], axis=-1)
    return logits, cache, Preview(bits, jnp.maximum(lengths - start, 0))


@jax.jit
def merge_previews(earlier: Preview, later: Preview) -> Preview:
    """Selects, for each row, the preview of more tokens, or the later one if both have equally many."""
    use_later = later.counts >= earlier.counts
    bits = jnp.where(use_later[:, None, None], later.bits, earlier.bits)
    return Preview(bits, jnp.where(use_later, later.counts, earlier.counts))


def _prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array, cache: KVCache, strategy: apply.Dense
) -> tuple[Float[Array, "b v"], Float[Array, "b t d"], KVCache]:
    """Returns the logits of ``prefill``, the hidden states of all tokens, and the cache."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, layers = model.hidden(tokens, positions, strategy, cache.layers_for(lengths))
    x = hidden.array
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return full_logits(model, last), x, cache.updated(layers, cache.lengths + lengths)


def full_logits(model: Decoder, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    """Returns the logits of a few hidden states at full precision."""
    head: apply.Apply = apply.Dense()
    if model.graded:
        # Reads all bits of the head without dequantizing it, which would make the largest array.
        read_all = jnp.zeros(model.full_bits // DIGIT_BITS, jnp.float32)
        head = apply.Graded(dict.fromkeys(model.lm_head.names, read_all))
    return model.logits(Activations.of(x), head)


def decode_step(
    model: Decoder,
    tokens: Int[Array, "b"],
    cache: KVCache,
    thresholds: Thresholds | None,
    active: Bool[Array, "b"] | None = None,
) -> tuple[Float[Array, "b v"], KVCache, GradingStats | None]:
    """Reads one token of every row, graded.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: One token per row.
      cache: Keys and values of the earlier tokens.
      thresholds: Thresholds of each row, by layer name.
      active: Rows that advance, by default all. The cache of other rows stays the same, and their logits are
        undefined.

    Returns:
      float32 logits of the next token, the cache, and the grading statistics ``[B, linears]`` (None for a
      dense model).
    """
    outputs, cache, stats = _step(model, tokens, cache, thresholds, active)
    return model.lm_head.in_order(outputs), cache, stats


def _step(model, tokens, cache, thresholds, active, level=None):
    """Runs ``decode_step``; returns the logits in the order of the output projection's outputs."""
    counts = jnp.ones_like(cache.lengths) if active is None else active.astype(jnp.int32)
    _, outputs, cache, stats = read_tokens(model, tokens[:, None], cache, thresholds, counts, level)
    return outputs[:, 0], cache, jax.tree.map(lambda positions: positions[:, 0], stats)


def read_tokens(
    model: Decoder,
    tokens: Int[Array, "b t"],
    cache: KVCache,
    thresholds: Thresholds | None,
    counts: Int[Array, "b"],
    level: int | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t v"], KVCache, GradingStats | None]:
    """Reads new tokens of every row, each graded at its own levels. The cache is read once.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: New tokens of each row, causal among themselves. On a GPU, more than 16
        graded rows B * t take several launches for each product.
      cache: Keys and values of the earlier tokens.
      thresholds: Thresholds by layer name, ``[B, P]``, or ``[B, t, P]`` for different ones at each position.
        A position with infinite thresholds reads no weights, and its logits are undefined.
      counts: Number of tokens by which each row advances; later ones may be any valid tokens.
      level: Level at which all channels are read, for many rows; the thresholds are then not used.

    Returns:
      Hidden states after the final norm; float32 logits after every token, in the order of the output
      projection's outputs; the cache; and the grading statistics ``[B, t, linears]`` (None for a dense
      model).
    """
    graded: apply.Graded | None = None
    if level is not None:
        graded = apply.AtLevel(level)
    elif thresholds is not None:
        graded = apply.Graded(thresholds)
    strategy = graded or apply.Dense()
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    x, layers = model.hidden(tokens, positions, strategy, cache.layers_for(counts))
    outputs = model.lm_head.outputs(x, strategy)
    cache = cache.updated(layers, cache.lengths + counts)
    if graded is None:
        return x.array, outputs, cache, None
    packed = _stacked_stats(model, graded).packed
    stats = GradingStats(packed.reshape(*tokens.shape, *packed.shape[1:]))
    return x.array, outputs, cache, stats


@jax.named_scope("grading_stats")
def _stacked_stats(model: Decoder, graded: apply.Graded) -> GradingStats:
    """Stacks the statistics of every position of every row to ``[rows, linears]``.

    Statistics of experts are reduced to those of tokens after they are stacked: XLA makes a kernel for every
    reduction.
    """
    names, stats = linear_names(model.config), graded.stats
    of_experts = [name for name in names if name in graded.of_experts]
    others = [name for name in names if name not in graded.of_experts]
    packed = jnp.stack([stats[name].packed.reshape(-1, 2) for name in others], axis=1)
    if not of_experts:
        return GradingStats(packed)
    of_rows = (stats[name].packed for name in of_experts)
    stacked = GradingStats(jnp.stack([rows.reshape(-1, *rows.shape[-2:]) for rows in of_rows], axis=1))
    packed = jnp.concatenate([packed, stacked.of_tokens().packed], axis=1)
    place = {name: i for i, name in enumerate(others + of_experts)}
    return GradingStats(packed[:, jnp.asarray([place[name] for name in names])])


def decode_chunk(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b"],
    done: Bool[Array, "b"],
    cache: KVCache,
    thresholds: Dial | Thresholds | None,
    sampling: Sampling,
    stop_tokens: Int[Array, "*rows e"],
    limits: Int[Array, "b"],
    *,
    steps: int,
    policy: DecodePolicy | None = None,
    history: TokenHistory | None = None,
    top_logprobs: int | None = None,
    level: int | None = None,
) -> tuple[Chunk, KVCache]:
    """Generates up to ``steps`` tokens per row without leaving the device.

    Always runs ``steps`` steps on a GPU; an early exit would force a host sync. The call therefore returns
    while the device computes, and the next chunk can be launched before this one has ended.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: Last token of each row, not yet in the cache.
      done: Rows that generate nothing.
      cache: Keys and values of the tokens before ``tokens``. Donated.
      thresholds: Dial, which sets the thresholds of each row before every step; or fixed ones, by layer name.
      sampling: Sampling parameters of each row.
      stop_tokens: A row is done when it generates one of these, which is still returned; the same for all
        rows, or those of each row.
      limits: Number of tokens that each row may generate in this call.
      steps: Largest number of tokens to generate for each row.
      policy: Policy that the loop is compiled for, by default ``DecodePolicy.for_device()``.
      history: Tokens that each row has, if ``sampling`` has penalties.
      top_logprobs: Number of most likely tokens whose log-probabilities are returned beside those of the new
        tokens; None for no log-probabilities.
      level: Level at which all rows read all input channels; the dial then stays as it is. None for grading
        (see ``reading.batch_level``).
    """
    policy = policy or DecodePolicy.for_device()
    options = {
        "steps": steps,
        "policy": policy,
        "history": history,
        "top_logprobs": top_logprobs,
        "level": level,
    }
    rows = tokens, done, cache, thresholds, sampling, stop_tokens, limits
    return jitted_decode_chunk(model, *rows, **options)


@jax.jit(static_argnames=("steps", "policy", "top_logprobs", "level"), donate_argnames="cache")
@on_mesh
def jitted_decode_chunk(
    model: Decoder | FlatModel,
    tokens: Int[Array, "b"],
    done: Bool[Array, "b"],
    cache: KVCache,
    thresholds: Dial | Thresholds | None,
    sampling: Sampling,
    stop_tokens: Int[Array, "*rows e"],
    limits: Int[Array, "b"],
    *,
    steps: int,
    policy: DecodePolicy,
    history: TokenHistory | None = None,
    top_logprobs: int | None = None,
    level: int | None = None,
) -> tuple[Chunk, KVCache]:
    """The program behind ``decode_chunk``, for callers that lower or compile it themselves."""
    model = decoder_of(model)
    dial = thresholds if isinstance(thresholds, Dial) else None
    # These two are computed once, outside the loop.
    fixed = thresholds.by_name() if isinstance(thresholds, StackedThresholds) else thresholds
    token_ids = model.lm_head.tokens()
    linears = None if thresholds is None else len(linear_names(model.config))
    done |= (limits <= 0) | (cache.lengths >= cache.capacity)
    empty = Chunk.empty(tokens, done, steps, linears, history, dial, top_logprobs)

    def choose(outputs, positions, history):
        return choose_tokens(
            outputs,
            sampling,
            positions,
            policy,
            history,
            token_ids=token_ids,
            in_order=model.lm_head.in_order,
        )

    def unfinished(state):
        step, chunk, _ = state
        return (step < steps) & ~jnp.all(chunk.done)

    def generate_one(state):
        step, chunk, cache = state
        active, positions = ~chunk.done, cache.lengths
        current_dial = None if dial is None else dial.with_state(chunk.dial)
        current = fixed if current_dial is None else _thresholds_by_name(current_dial, active)
        if level is not None:  # No threshold is used, and the dial stays as it is.
            current_dial = current = None
        outputs, cache, stats = _step(model, chunk.last, cache, current, active, level)
        token = jnp.where(active, choose(outputs, cache.lengths, chunk.history), chunk.last)
        logprobs = None
        if top_logprobs is not None:
            logprobs = token_logprobs(model.lm_head.in_order(outputs), token, top_logprobs)
        counts = chunk.counts + active
        stopped = jnp.any(token[:, None] == stop_tokens, axis=-1)
        chunk = Chunk(
            tokens=chunk.tokens.at[:, step].set(token),
            counts=counts,
            last=token,
            done=chunk.done | stopped | (counts >= limits) | (cache.lengths >= cache.capacity),
            grading_stats=jax.tree.map(lambda kept, new: kept.at[step].set(new), chunk.grading_stats, stats),
            history=None if chunk.history is None else chunk.history.with_tokens(token, active),
            dial=chunk.dial
            if current_dial is None
            else current_dial.follow(stats.bits, active, positions).state,
            logprobs=jax.tree.map(lambda kept, new: kept.at[step].set(new), chunk.logprobs, logprobs),
        )
        return step + 1, chunk, cache

    state = 0, empty, cache
    if policy.early_exit:
        state = jax.lax.while_loop(unfinished, generate_one, state)
    else:
        state = jax.lax.fori_loop(0, steps, lambda _, state: generate_one(state), state)
    _, chunk, cache = state
    return chunk, cache


@jax.named_scope("dial")
def _thresholds_by_name(dial: Dial, active: Bool[Array, "b"]) -> dict[str, Float[Array, "b p"]]:
    """Returns the thresholds at the dial's setting, by layer name.

    A weight row is read once for all rows, at the highest level that one of them needs. An inactive row needs
    none: its thresholds are infinite.
    """
    # Without the barriers XLA may fuse the interpolation into the kernels of every layer, so that the kernels
    # of the layers differ and all of them must be compiled.
    each = interpolate_each(dial.tables, dial.targets, dial.setting)
    if len(active) > 1:  # A single row is active until the answer ends.
        each = [jnp.where(active[:, None], thresholds, jnp.inf) for thresholds in each]
    return jax.lax.optimization_barrier(dict(zip(dial.names, each, strict=True)))


def decoder_of(model: Decoder | FlatModel) -> Decoder:
    """Returns the decoder of a flat model, or the decoder itself."""
    return model.module if isinstance(model, FlatModel) else model
