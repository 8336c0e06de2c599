"""The programs of speculation on the state of all slots."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int, UInt32

from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.engine.chunk import Chunk
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.slots.state import DecodeState
from grinqh_jax.decoding.speculation.chunk import speculative_chunk
from grinqh_jax.decoding.speculation.counts import PackedCounts
from grinqh_jax.decoding.speculation.drafter import Drafter, DrafterState
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.sharding.program import on_mesh


@jax.jit(static_argnames="pages_read", donate_argnames="shared")
def read_prompt(
    drafter: Drafter,
    shared: Any,
    pages: Int[Array, "1 pages_per_slot"],
    length: Int[Array, "1"],
    tokens: Int[Array, "1 t"],
    true_length: Int[Array, "1"],
    *,
    pages_read: int,
) -> Any:
    """Reads a prefill chunk with the drafter (see ``Drafter.prefill`` and ``prompts.prefill``).

    Donates ``shared``.
    """
    return drafter.prefill(shared, pages[:, :pages_read], length, tokens, true_length)


@jax.jit(static_argnames=("policy", "greedy", "top_logprobs", "steps", "drafts"), donate_argnames="state")
@on_mesh
def speculate(
    model: FlatModel,
    state: DecodeState,
    dial: Dial | None,
    drafter: Drafter,
    rows: Int[Array, "n"] | None,
    most_drafts: Int[Array, "n"],
    allowed: UInt32[Array, "n words"] | None = None,
    *,
    policy: DecodePolicy,
    greedy: bool,
    top_logprobs: int | None,
    steps: int,
    drafts: int,
) -> tuple[DecodeState, Chunk, PackedCounts]:
    """Decodes ``steps`` to ``steps * (drafts + 1)`` tokens for some slots, with speculation.

    Args:
      model, state, dial, policy, greedy, top_logprobs: As in ``answers.generate``.
      drafter: Proposes the tokens that are verified.
      rows: As in ``answers.generate``. The slots share the graded rows of a step: ``n * (drafts + 1)`` is at
        most 16.
      most_drafts: Largest number of drafts of each of these slots.
      allowed: Tokens that each of these slots may choose, as in ``answers.generate``, with ``drafts=0``.
      steps: Number of steps.
      drafts: Largest number of drafts of a slot.

    Returns:
      The state, the new tokens with a row for each of ``rows``, and what the chunk did.
    """
    slots = state.slots.of(rows)
    assert slots.texts is not None, "the state was created for speculation"
    chunk, cache, texts, drafter_state, counts = speculative_chunk(
        decoder_of(model),
        slots.last,
        slots.done,
        state.cache.texts(slots.pages, slots.lengths, slots.fixed),
        slots.dial_of(dial),
        slots.sampling(greedy, allowed),
        slots.settings.stop_tokens,
        slots.settings.limits,
        slots.texts,
        drafter,
        DrafterState(slots.drafter, state.drafter),
        most_drafts,
        steps=steps,
        drafts=drafts,
        policy=policy,
        history=None if greedy else slots.history,
        top_logprobs=top_logprobs,
    )
    after = dataclasses.replace(slots.after(chunk, cache), texts=texts, drafter=drafter_state.rows)
    state = DecodeState(PagedCache.of(cache), state.slots.updated(rows, slots, after), drafter_state.shared)
    return state, dataclasses.replace(chunk, history=None, dial=None), counts
