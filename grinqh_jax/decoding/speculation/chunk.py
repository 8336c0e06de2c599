"""The decode loop with drafts: each step drafts, verifies and accepts, without leaving the device."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.engine.chunk import Chunk
from grinqh_jax.decoding.engine.step import read_tokens
from grinqh_jax.decoding.logprobs import token_logprobs
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling, adjust, choose_tokens, probabilities
from grinqh_jax.decoding.speculation import acceptance, block_dial
from grinqh_jax.decoding.speculation.counts import Counts, PackedCounts
from grinqh_jax.decoding.speculation.drafter import Draft, Drafter, Target, Texts, Verified
from grinqh_jax.decoding.thresholds import Thresholds, interpolate_each
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels import GradingStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotTexts:
    """Tokens and dial block of the text in each slot.

    Attributes:
      tokens: int32 ``[B, S]``, prompt and answer; entries after the last token are padding.
      pending: float32 ``[B, 4]``, sums of the tokens of the dial's block so far (see ``block_dial``).
    """

    tokens: Int[Array, "b s"]
    pending: Float[Array, "b 4"]


class Verification(NamedTuple):
    """The result of verifying the drafts of each text.

    XLA drops what nobody uses. Without log-probabilities, the logits stay in the branch that computes them.

    Attributes:
      accepted: int32 ``[B]``, number of accepted drafts.
      cache: The cache, as ``verify`` returns it.
      tokens: int32 ``[B, t]``, the new tokens of each text; the first ``accepted + 1`` count.
      outputs, hidden, stats: Logits, hidden states and statistics, as ``verify`` returns them.
    """

    accepted: Int[Array, "b"]
    cache: KVCache
    tokens: Int[Array, "b t"]
    outputs: Float[Array, "b t v"]
    hidden: Float[Array, "b t d"]
    stats: GradingStats | None


class Loop(NamedTuple):
    """State of the loop, which changes from step to step."""

    step: Any
    chunk: Chunk
    cache: KVCache
    texts: SlotTexts
    drafter: Any
    counts: PackedCounts


def speculative_chunk(
    model: Decoder,
    tokens: Int[Array, "b"],
    done: Bool[Array, "b"],
    cache: KVCache,
    thresholds: Dial | Thresholds | None,
    sampling: Sampling,
    stop_tokens: Int[Array, "*rows e"],
    limits: Int[Array, "b"],
    texts: SlotTexts,
    drafter: Drafter,
    drafter_state: Any,
    most_drafts: Int[Array, "b"],
    *,
    steps: int,
    drafts: int,
    policy: DecodePolicy,
    history: TokenHistory | None = None,
    top_logprobs: int | None = None,
) -> tuple[Chunk, KVCache, SlotTexts, Any, PackedCounts]:
    """Generates 1 to ``drafts + 1`` tokens per text and step, as ``engine.decode_chunk`` does with drafts.

    With fixed thresholds or a dial that is held, the texts are those of ``decode_chunk``. With a dial that
    follows, they do not depend on the drafts.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens, done, cache, thresholds, sampling, stop_tokens, limits: As in ``decode_chunk``.
      texts: Tokens of each text, the last included.
      drafter: Proposes the drafts.
      drafter_state: Its state.
      most_drafts: Largest number of drafts of each text in a step.
      steps: Number of steps. Ends earlier if all texts are done and the policy allows it.
      drafts: Largest number of drafts of all texts. ``B * (drafts + 1)`` is at most 16 on the graded path.
      policy, history, top_logprobs: As in ``decode_chunk``.

    Returns:
      The chunk, with room for ``steps * (drafts + 1)`` tokens; cache, texts and state of the drafter after
      it; and what it did.
    """
    dial = thresholds if isinstance(thresholds, Dial) else None
    batch, width = len(tokens), drafts + 1
    linears = None if thresholds is None else len(linear_names(model.config))
    done |= (limits <= 0) | (cache.lengths >= cache.capacity)
    if model.partition is not None:
        cache = dataclasses.replace(cache, mailbox=model.partition.opened(batch * width))
    empty = Chunk.empty(tokens, done, steps * width, linears, history, dial, top_logprobs)
    zeros = jnp.zeros(batch, jnp.int32)
    loop = Loop(0, empty, cache, texts, drafter_state, PackedCounts.zeros(batch))
    token_ids, offsets = model.lm_head.tokens(), jnp.arange(width)
    # XLA makes a branch a part of the step's CUDA graph (``benchmarks/notes``, entry D25). On several GPUs
    # the collectives in it would keep it out, and it would wait for the host.
    branches = drafts > 0 and model.partition is None

    def read_and_accept(chunk: Chunk, cache: KVCache, dial: Dial | None, draft: Draft) -> Verification:
        """Returns ``drafts + 1`` positions of each text, zeros where ``draft.tokens`` has fewer columns."""
        positions = cache.lengths[:, None] + 1 + offsets[: draft.tokens.shape[1] + 1]
        read = ~chunk.done[:, None] & (offsets[: positions.shape[1]] <= draft.counts[:, None])
        inputs = jnp.concatenate([chunk.last[:, None], draft.tokens], axis=1)
        outputs, hidden, cache, stats = verify(model, inputs, cache, _thresholds(dial or thresholds, read))
        tokens, accepted = _accept(
            model, outputs, token_ids, draft, sampling, positions, policy, chunk.history
        )

        def padded(rows: jax.Array) -> jax.Array:
            return jnp.pad(rows, [(0, 0), (0, width - rows.shape[1]), *[(0, 0)] * (rows.ndim - 2)])

        rows = jax.tree.map(padded, (tokens, outputs, hidden, stats))
        return Verification(accepted, cache, *rows)

    def one_step(loop: Loop) -> Loop:
        chunk, cache, texts = loop.chunk, loop.cache, loop.texts
        active, lengths = ~chunk.done, cache.lengths
        drafter_state = loop.drafter
        current_dial = None if dial is None or chunk.dial is None else dial.with_state(chunk.dial)
        limit = jnp.minimum(limits - chunk.counts, cache.capacity - lengths)
        if (left := block_dial.left_in_block(current_dial, texts.pending)) is not None:
            limit = jnp.minimum(limit, left)
        draft = Draft(jnp.zeros((batch, 0), jnp.int32), zeros)
        if drafts:
            so_far = Texts(texts.tokens, lengths + 1, cache.pages)
            target = Target(model, cache, sampling, policy)
            draft, drafter_state, cache = drafter.propose(drafter_state, target, so_far, drafts)
        counts = jnp.minimum(jnp.minimum(draft.counts, most_drafts), limit - 1)
        counts = jnp.where(active, jnp.maximum(counts, 0), 0)

        def read(draft: Draft) -> Verification:
            return read_and_accept(chunk, cache, current_dial, draft)

        draft = dataclasses.replace(draft, counts=counts)
        if branches:
            none = Draft(draft.tokens[:, :0], zeros)
            verification = jax.lax.cond(jnp.any(counts > 0), lambda: read(draft), lambda: read(none))
        else:
            verification = read(draft)
        accepted, cache, tokens, outputs, hidden, stats = verification
        positions = lengths[:, None] + 1 + offsets
        # A stop token ends the text, and the drafts after it do not count.
        stops = jnp.any(tokens[..., None] == _per_text(stop_tokens), axis=-1)
        first_stop = jnp.argmax(jnp.pad(stops, ((0, 0), (0, 1)), constant_values=True), axis=1)
        produced = jnp.where(active, jnp.minimum(accepted, first_stop) + 1, 0)
        is_new = offsets < produced[:, None]
        last = jnp.take_along_axis(tokens, jnp.maximum(produced - 1, 0)[:, None], axis=1)[:, 0]
        last = jnp.where(active, last, chunk.last)
        cache = cache.rollback(lengths + produced)
        total = chunk.counts + produced
        text_tokens = _scatter(texts.tokens.T, positions, is_new, tokens).T
        after = Texts(text_tokens, lengths + 1 + produced, cache.pages)
        drafter_state = drafter.follow(drafter_state, Verified(hidden, produced, after))
        next_dial, pending, next_history = current_dial, texts.pending, chunk.history
        if current_dial is not None and stats is not None:
            next_dial, pending = block_dial.follow(current_dial, pending, stats.bits, is_new, positions - 1)
        if next_history is not None:
            for i in range(width):
                next_history = next_history.with_tokens(tokens[:, i], is_new[:, i])
        logprobs = None
        if top_logprobs is not None:
            logits = model.lm_head.in_order(outputs)
            flat = token_logprobs(_flat(logits), tokens.reshape(-1), top_logprobs)
            logprobs = jax.tree.map(lambda rows: rows.reshape(batch, width, *rows.shape[1:]), flat)
        indices = chunk.counts[:, None] + offsets

        def written(kept, new):
            return _scatter(kept, indices, is_new, new)

        rejected = active[:, None] & (offsets <= counts[:, None]) & ~is_new
        bits = jnp.zeros(batch, jnp.float32)
        if current_dial is not None and stats is not None:
            bits = jnp.sum(current_dial.mean_bits(stats.bits), axis=1, where=rejected)
        chunk = Chunk(
            tokens=_scatter(chunk.tokens.T, indices, is_new, tokens).T,
            counts=total,
            last=last,
            done=chunk.done
            | (active & jnp.any(stops & is_new, axis=1))
            | (total >= limits)
            | (cache.lengths >= cache.capacity),
            grading_stats=jax.tree.map(written, chunk.grading_stats, stats),
            history=next_history,
            dial=None if next_dial is None else next_dial.state,
            logprobs=jax.tree.map(written, chunk.logprobs, logprobs),
        )
        texts = SlotTexts(text_tokens, pending)
        return Loop(
            loop.step + 1,
            chunk,
            cache,
            texts,
            drafter_state,
            loop.counts.plus(Counts.of_step(active, counts, produced, bits)),
        )

    if policy.early_exit:

        def unfinished(loop: Loop):
            return (loop.step < steps) & ~jnp.all(loop.chunk.done)

        loop = jax.lax.while_loop(unfinished, one_step, loop)
    else:
        loop = jax.lax.fori_loop(0, steps, lambda _, loop: one_step(loop), loop)
    cache = dataclasses.replace(loop.cache, mailbox=None)
    return loop.chunk, cache, loop.texts, loop.drafter, loop.counts


def verify(
    model: Decoder, tokens: Int[Array, "b t"], cache: KVCache, thresholds: Thresholds | None
) -> tuple[Float[Array, "b t v"], Float[Array, "b t d"], KVCache, GradingStats | None]:
    """Reads the last token and the drafts of each text, each position at its own levels.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      tokens: Last token and drafts of each text.
      cache: Keys and values of the tokens before them.
      thresholds: Thresholds by layer name, ``[B, t, P]``. A position with infinite ones reads no weights.

    Returns:
      float32 logits at each position, in the order of the output projection's outputs; hidden states after
      the final norm; the cache, all positions longer; and the grading statistics ``[B, t, linears]``.
    """
    hidden, outputs, cache, stats = read_tokens(
        model, tokens, cache, thresholds, jnp.full(len(tokens), tokens.shape[1])
    )
    return outputs, hidden, cache, stats


def _accept(model, outputs, token_ids, draft, sampling, positions, policy, history):
    """Returns the new tokens and the number of accepted drafts."""
    batch, width = positions.shape
    rows = jax.tree.map(lambda row: jnp.repeat(row, width, axis=0), sampling)
    if sampling.penalties is None:
        histories = None
    else:
        assert history is not None, "penalties need the tokens that the text has"
        histories = _with_drafts(history, draft)
    head = model.lm_head
    chosen = choose_tokens(
        _flat(outputs),
        rows,
        positions.reshape(-1),
        policy,
        histories,
        token_ids=token_ids,
        in_order=head.in_order,
    ).reshape(batch, width)
    if draft.probabilities is None or sampling.greedy:
        return acceptance.by_match(chosen, draft)
    target = probabilities(adjust(_flat(head.in_order(outputs)), rows, histories), rows, policy)
    target = target.reshape(batch, width, -1)
    return acceptance.by_rejection(chosen, draft, target, sampling, positions)


def _with_drafts(history: TokenHistory, draft: Draft) -> TokenHistory:
    """Returns the history ``[B * t, V]`` at each position, which has the drafts before it."""
    batch, drafts = draft.tokens.shape
    steps = [history]
    for i in range(drafts):
        steps.append(steps[-1].with_tokens(draft.tokens[:, i], jnp.ones(batch, bool)))
    return jax.tree.map(lambda *rows: _flat(jnp.stack(rows, axis=1)), *steps)


def _thresholds(thresholds: Dial | Thresholds | None, read: Bool[Array, "b t"]) -> Thresholds | None:
    """Returns thresholds ``[B, t, P]`` by layer name, infinite at positions that are not read."""
    if thresholds is None:
        return None
    if isinstance(thresholds, Dial):
        each = interpolate_each(thresholds.tables, thresholds.targets, thresholds.setting)
        thresholds = dict(zip(thresholds.names, each, strict=True))
    by_position = {
        name: jnp.where(read[..., None], thresholds[name][..., None, :], jnp.inf) for name in thresholds
    }
    # The barrier keeps the kernels of all layers equal (see ``engine.chunk``).
    return jax.lax.optimization_barrier(by_position)


def _per_text(stop_tokens: Int[Array, "*rows e"]) -> Int[Array, "..."]:
    return stop_tokens if stop_tokens.ndim == 1 else stop_tokens[:, None]


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, *rows.shape[2:])


def _scatter(kept: jax.Array, indices: Int[Array, "b t"], is_new: Bool[Array, "b t"], new: jax.Array):
    """Returns ``kept [indices, B, ...]`` with ``new [B, t, ...]`` where ``is_new``."""
    texts = jnp.arange(len(indices))[:, None]
    return kept.at[jnp.where(is_new, indices, len(kept)), texts].set(new, mode="drop")
