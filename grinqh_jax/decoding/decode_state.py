"""The engine's part on the device: a state with a row for each slot, and pure functions on it.

A slot decodes one request. ``prefill`` reads a prompt piece by piece into pages, ``insert`` starts its answer
in a slot, ``generate`` decodes a chunk for all slots, and ``free`` ends a slot. All settings of a request are
arrays, and all shapes depend on the engine alone, so requests come and go without a compilation. States and
caches are donated: use the returned ones.

Texts that share nothing have one page each, with the number of their slot. The cache of all slots is then
contiguous, and needs no page table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.first_tokens import first_tokens
from grinqh_jax.decoding.logprobs import TokenLogprobs, token_logprobs
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefix import Prefix
from grinqh_jax.decoding.prompt_logprobs import prompt_logprobs as logprobs_of_prompt
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.settings import Settings
from grinqh_jax.decoding.speculation.chunk import SlotTexts
from grinqh_jax.decoding.speculation.drafter import Drafter, DrafterState
from grinqh_jax.decoding.thresholds import StackedThresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.fixed_states import FixedStates
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """One row for each slot.

    Attributes:
      settings: Settings of the requests.
      pages: int32 ``[B, pages_per_slot]``, pages of each text (see ``PagedCache``); None if slot b has page b
        and no other.
      lengths: int32 ``[B]``, number of tokens in the cache: all but the last.
      last: int32 ``[B]``, last token of each text, not yet in the cache.
      done: bool ``[B]``, slots that generate nothing: empty ones, and answers that have ended.
      history: Tokens that each text has; None if the settings have no penalties.
      dial: State of the dial of each slot; None for a dense model.
      fixed: States of a fixed size of each text.
      texts: Tokens of each text; None without speculation.
      drafter: Rows of the drafter's state.
    """

    settings: Settings
    pages: Int[Array, "b pages_per_slot"] | None
    lengths: Int[Array, "b"]
    last: Int[Array, "b"]
    done: Bool[Array, "b"]
    history: TokenHistory | None
    dial: DialState | None
    fixed: FixedStates
    texts: SlotTexts | None = None
    drafter: Any = None

    def sampling(self, greedy: bool, allowed: UInt32[Array, "b words"] | None) -> Sampling:
        """Returns how tokens are chosen; ``greedy`` and ``allowed`` as in ``generate``."""
        sampling = dataclasses.replace(self.settings.sampling, allowed=allowed)
        if greedy:
            sampling = dataclasses.replace(sampling, greedy=True, penalties=None, logit_bias=None)
        return sampling

    def dial_of(self, dial: Dial | None) -> Dial | None:
        """Returns the model's dial with the state of each slot; None for a dense model."""
        if dial is None:
            return None
        assert self.dial is not None, "a graded model has a dial"
        return dial.with_state(self.dial)

    def after(self, chunk: engine.Chunk, cache: KVCache) -> "Slots":
        """Returns the rows after a chunk that left the texts in ``cache``."""
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, limits=self.settings.limits - chunk.counts),
            lengths=cache.lengths,
            last=chunk.last,
            done=chunk.done,
            history=self.history if chunk.history is None else chunk.history,
            dial=chunk.dial,
            fixed=cache.fixed,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes while the engine runs.

    Attributes:
      cache: Keys and values of all texts and of the kept prefixes.
      slots: One row for each slot.
      drafter: What the drafter shares among all texts.
    """

    cache: PagedCache
    slots: Slots
    drafter: Any = None

    @classmethod
    def create(
        cls,
        cache: PagedCache,
        config: ModelConfig,
        settings: Settings,
        slots: int,
        pages_per_slot: int | None,
        graded: bool,
        fixed: FixedStates,
        drafter: Drafter | None = None,
    ) -> "DecodeState":
        """Returns a state of empty slots, whose rows are numpy arrays.

        Args:
          cache: Pages of all texts.
          config: Configuration of the model.
          settings: Settings of one request. Those of all requests have the same structure and shapes.
          slots: Number of slots.
          pages_per_slot: Largest number of pages of a text; None if slot b has page b and no other.
          graded: Whether the model is graded.
          fixed: States of a fixed size of empty texts, one for each slot.
          drafter: Drafter of speculation; None without.
        """
        shared = pages_per_slot is not None

        # numpy arrays, because each jax array would be a separate dispatch.
        def full(value: Any, *shape: int, dtype: Any = np.int32) -> Any:
            return np.full((slots, *shape), value, dtype)

        history = None
        if settings.sampling.penalties is not None:
            history = TokenHistory(full(0, config.vocab_size))
        drafts, texts = DrafterState(), None
        if drafter is not None:
            drafts = drafter.create(slots, cache.num_pages, cache.page_size)
            capacity = (pages_per_slot or 1) * cache.page_size
            texts = SlotTexts(full(0, capacity), full(0, 4, dtype=np.float32))
        rows = Slots(
            settings=jax.tree.map(lambda row: full(0, *row.shape[1:], dtype=row.dtype), settings),
            pages=full(cache.num_pages, pages_per_slot) if pages_per_slot is not None else None,
            lengths=full(0 if shared else cache.page_size),
            last=full(0),
            done=full(True, dtype=bool),
            history=history,
            dial=DialState(full(0, dtype=np.float32), full(0, 4, dtype=np.float32)) if graded else None,
            fixed=fixed,
            texts=texts,
            drafter=drafts.rows,
        )
        return cls(cache, rows, drafts.shared)


@jax.jit
def preview_thresholds(dial: Dial, bits: Float[Array, "1"]) -> StackedThresholds:
    """Returns the thresholds of a text before its first token.

    This is not part of ``prefill``, where XLA (jax 0.10.2, on a CPU) interpolates the thresholds again for
    every channel of every layer: 25 ms instead of 16 for a prompt of 9 tokens and the bundled model.

    Args:
      dial: Dial of the model; its state is ignored.
      bits: Wanted mean bits.
    """
    return dial.with_state(DialState.create(bits)).thresholds


@jax.jit(donate_argnames="cache")
@on_mesh
def prefill(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    true_length: Int[Array, "1"],
    thresholds: StackedThresholds | None,
) -> tuple[PagedCache, Prefix]:
    """Reads the next piece of a prompt at full precision.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Next tokens, right-padded with any valid token.
      true_length: Number of tokens without padding.
      thresholds: Thresholds for the preview (see ``preview_thresholds``).

    Returns:
      The pages, with the keys and values of the new tokens, and the longer prefix.
    """
    text = cache.texts(prefix.pages, prefix.length, prefix.fixed)
    if thresholds is None:
        logits, text = engine.prefill(model, tokens, true_length, text)
        preview = None
    else:
        logits, text, preview = engine.prefill_with_preview(model, tokens, true_length, text, thresholds)
        assert prefix.preview is not None, "a graded model has previews"
        preview = engine.merge_previews(prefix.preview, preview)
    return PagedCache.of(text), Prefix(prefix.pages, text.lengths, logits, preview, text.fixed)


@jax.jit(static_argnames="top_logprobs", donate_argnames="cache")
@on_mesh
def prompt_logprobs(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    following: Int[Array, "1 t"],
    *,
    top_logprobs: int,
) -> tuple[PagedCache, TokenLogprobs]:
    """Returns the log-probabilities of the prompt tokens after those of a piece, before ``prefill`` reads it.

    Args:
      model: Graded or dense model.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Tokens of the piece, right-padded with any valid token.
      following: Token after each of them.
      top_logprobs: As in ``generate``.
    """
    text = cache.texts(prefix.pages, prefix.length, prefix.fixed)
    logprobs, text = logprobs_of_prompt(model, tokens, following, text, top_logprobs)
    return PagedCache.of(text), logprobs


@jax.jit(static_argnames=("policy", "top_logprobs"), donate_argnames="state")
def insert(
    state: DecodeState,
    slot: Int[Array, ""],
    prefix: Prefix,
    settings: Settings,
    in_prompt: Bool[Array, "1 v"] | None,
    dial: Dial | None,
    allowed: UInt32[Array, "1 words"] | None,
    drafter: Drafter | None = None,
    prompt: Int[Array, "1 s"] | None = None,
    *,
    policy: DecodePolicy,
    top_logprobs: int | None,
) -> tuple[DecodeState, engine.Chunk]:
    """Chooses the first token after a prompt and starts the answer in a slot.

    Args:
      state: State of all slots. Donated.
      slot: Index of an empty slot.
      prefix: The whole prompt.
      settings: Settings of the request.
      in_prompt: Whether the prompt has each token; None if the settings have no penalties.
      dial: Dial of the model; its state is ignored.
      allowed: Tokens that may come first (see ``sampling.Sampling``); None for all.
      drafter, prompt: Drafter of speculation, and the tokens of the prompt, padded to the capacity of a slot;
        None without.
      policy: Policy of the device.
      top_logprobs: As in ``generate``.

    Returns:
      The state, and the first token as a chunk of one row and one step.
    """
    history = None
    if in_prompt is not None:
        history = TokenHistory.before_text(in_prompt)
    if dial is not None:
        dial = dial.with_state(DialState.create(settings.bits))
    first, history, dial = first_tokens(
        prefix.logits,
        prefix.preview,
        prefix.length,
        dataclasses.replace(settings.sampling, allowed=allowed),
        history,
        dial,
        policy=policy,
    )
    texts, drafts = None, None
    if drafter is not None and prompt is not None:
        tokens = jnp.where(jnp.arange(prompt.shape[1]) == prefix.length[:, None], first[:, None], prompt)
        texts = SlotTexts(tokens, jnp.zeros((1, 4), jnp.float32))
        drafts = drafter.begin(prefix.length)
    limits = settings.limits - 1
    row = Slots(
        settings=dataclasses.replace(settings, limits=limits),
        pages=None if state.slots.pages is None else prefix.pages,
        lengths=prefix.length,
        last=first,
        done=(limits <= 0) | jnp.any(first[:, None] == settings.stop_tokens, axis=-1),
        history=history,
        dial=None if dial is None else dial.state,
        fixed=prefix.fixed,
        texts=texts,
        drafter=drafts,
    )
    if len(state.slots.last) == 1:
        slots = row
    else:
        slots = jax.tree.map(lambda rows, new: rows.at[slot].set(new[0]), state.slots, row)
    logprobs = None
    if top_logprobs is not None:
        logprobs = token_logprobs(prefix.logits, first, top_logprobs)
    chunk = engine.Chunk(
        tokens=first[:, None],
        counts=jnp.ones(1, jnp.int32),
        last=first,
        done=row.done,
        grading_stats=None,
        logprobs=jax.tree.map(lambda array: array[None], logprobs),
    )
    return dataclasses.replace(state, slots=slots), chunk


@jax.jit(static_argnames=("policy", "greedy", "top_logprobs", "level"), donate_argnames="state")
@on_mesh
def generate(
    model: FlatModel,
    state: DecodeState,
    dial: Dial | None,
    allowed: UInt32[Array, "b words"] | None = None,
    *,
    policy: DecodePolicy,
    greedy: bool,
    top_logprobs: int | None,
    level: int | None = None,
) -> tuple[DecodeState, engine.Chunk]:
    """Decodes up to ``policy.chunk_steps`` tokens for every slot that is not done.

    Args:
      model: Graded model; or a dense one, with ``dial=None``.
      state: State of all slots. Donated.
      dial: Dial of the model; its state is ignored.
      allowed: Tokens that each slot may choose (see ``sampling.Sampling``), for chunks of one step; None for
        all.
      policy: How the loop is compiled.
      greedy: Whether all slots that are not done decode greedily, without penalties and biases. The program
        then neither sorts nor penalizes. It chooses the same tokens as the other one.
      top_logprobs: Number of most likely tokens whose log-probabilities are returned beside those of the new
        tokens; None for no log-probabilities.
      level: As in ``engine.decode_chunk``.

    Returns:
      The state, and the new tokens with their grading statistics.
    """
    slots, settings = state.slots, state.slots.settings
    chunk, texts = engine.jitted_decode_chunk(
        model,
        slots.last,
        slots.done,
        state.cache.texts(slots.pages, slots.lengths, slots.fixed),
        slots.dial_of(dial),
        slots.sampling(greedy, allowed),
        settings.stop_tokens,
        settings.limits,
        steps=policy.chunk_steps,
        policy=policy,
        history=None if greedy else slots.history,
        top_logprobs=top_logprobs,
        level=level,
    )
    state = dataclasses.replace(state, cache=PagedCache.of(texts), slots=slots.after(chunk, texts))
    return state, dataclasses.replace(chunk, history=None, dial=None)


@jax.jit(donate_argnames="state")
def free(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Ends the answer in a slot. Its pages may then be given to other texts."""
    slots, cache = state.slots, state.cache
    # Decode chunks write a key and a value for every slot. A slot without pages, or with a full page, drops
    # them, because another text may use the page.
    pages = None if slots.pages is None else slots.pages.at[slot].set(cache.num_pages)
    length = cache.page_size if slots.pages is None else 0
    slots = dataclasses.replace(
        slots,
        pages=pages,
        lengths=slots.lengths.at[slot].set(length),
        done=slots.done.at[slot].set(True),
    )
    return dataclasses.replace(state, slots=slots)


@jax.jit(donate_argnames="state")
def turn(state: DecodeState, slot: Int[Array, ""], bits: Float[Array, ""]) -> DecodeState:
    """Changes the wanted mean bits of an answer, from its next decode chunk on."""
    assert state.slots.dial is not None, "a dense model has no dial"
    dial = dataclasses.replace(state.slots.dial, wanted=state.slots.dial.wanted.at[slot].set(bits))
    return dataclasses.replace(state, slots=dataclasses.replace(state.slots, dial=dial))
