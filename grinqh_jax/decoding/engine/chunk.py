"""The decode loop on the device: a chunk of decode steps, each with the choice of the next tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.engine.step import step_outputs
from grinqh_jax.decoding.logprobs import TokenLogprobs, token_logprobs
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, choose_tokens
from grinqh_jax.decoding.thresholds import StackedThresholds, Thresholds, interpolate_each
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.sharding.program import on_mesh
from pallas_kernels import GradingStats


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
    fixed = None if isinstance(thresholds, Dial) else thresholds
    fixed = fixed.by_name() if isinstance(fixed, StackedThresholds) else fixed
    token_ids = model.lm_head.tokens()
    linears = None if thresholds is None else len(linear_names(model.config))
    done |= (limits <= 0) | (cache.lengths >= cache.capacity)
    if model.partition is not None:
        cache = dataclasses.replace(cache, mailbox=model.partition.opened(len(tokens)))
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

    def followed(dial, stats, active, positions):
        assert stats is not None, "a graded step has statistics"
        return dial.follow(stats.bits, active, positions).state

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
        outputs, cache, stats = step_outputs(model, chunk.last, cache, current, active, level)
        token = jnp.where(active, choose(outputs, cache.lengths, chunk.history), chunk.last)
        logprobs = None
        if top_logprobs is not None:
            logprobs = token_logprobs(model.lm_head.in_order(outputs), token, top_logprobs)
        counts = chunk.counts + active
        stopped = jnp.any(token[:, None] == stop_tokens, axis=-1)

        def written(kept: jax.Array, new: jax.Array) -> jax.Array:
            # Not an update of a slice, whose check of bounds is a launch of its own on a GPU.
            return jnp.where(jnp.arange(steps).reshape(-1, *[1] * new.ndim) == step, new, kept)

        chunk = Chunk(
            tokens=written(chunk.tokens.T, token).T,
            counts=counts,
            last=token,
            done=chunk.done | stopped | (counts >= limits) | (cache.lengths >= cache.capacity),
            grading_stats=jax.tree.map(written, chunk.grading_stats, stats),
            history=None if chunk.history is None else chunk.history.with_tokens(token, active),
            dial=chunk.dial if current_dial is None else followed(current_dial, stats, active, positions),
            logprobs=jax.tree.map(written, chunk.logprobs, logprobs),
        )
        return step + 1, chunk, cache

    state = 0, empty, cache
    if policy.early_exit:
        state = jax.lax.while_loop(unfinished, generate_one, state)
    else:
        state = jax.lax.fori_loop(0, steps, lambda _, state: generate_one(state), state)
    _, chunk, cache = state
    return chunk, dataclasses.replace(cache, mailbox=None)


@jax.named_scope("dial")
def _thresholds_by_name(dial: Dial, active: Bool[Array, "b"]) -> dict[str, Float[Array, "b p"]]:
    """Returns the thresholds at the dial's setting, by layer name.

    An input channel is read once for all rows, at the highest level that one of them needs. An inactive row
    needs none: its thresholds are infinite.
    """
    # Without the barriers XLA may fuse the interpolation into the kernels of every layer, so that the kernels
    # of the layers differ and all of them must be compiled.
    each = interpolate_each(dial.tables, dial.targets, dial.setting)
    if len(active) > 1:  # A single row is active until the answer ends.
        each = [jnp.where(active[:, None], thresholds, jnp.inf) for thresholds in each]
    return jax.lax.optimization_barrier(dict(zip(dial.names, each, strict=True)))
