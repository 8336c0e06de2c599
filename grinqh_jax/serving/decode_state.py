"""The engine's part on the device: a state with a row for each slot, and pure functions on it.

A slot decodes one request. ``prefill`` reads a prompt piece by piece into pages, ``insert`` starts its answer
in a slot, ``generate`` decodes a chunk for all slots, and ``free`` ends a slot. All settings of a request are
arrays, and all shapes depend on the engine alone, so requests come and go without a compilation. States and
caches are donated: use the returned ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.logprobs import MOST_LOGPROBS, TokenLogprobs, token_logprobs
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.serving.paged_cache import PagedCache
from grinqh_jax.serving.settings import NO_TOKEN, Settings, sampling_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """One row for each slot.

    Attributes:
      settings: Settings of the requests.
      pages: int32 ``[B, pages_per_slot]``, pages of each text (see ``PagedCache``).
      lengths: int32 ``[B]``, number of tokens in the cache: all but the last.
      last: int32 ``[B]``, last token of each text, not yet in the cache.
      done: bool ``[B]``, slots that generate nothing: empty ones, and answers that have ended.
      history: Tokens that each text has.
      dial: State of the dial of each slot; None for a dense model.
    """

    settings: Settings
    pages: Int[Array, "b pages_per_slot"]
    lengths: Int[Array, "b"]
    last: Int[Array, "b"]
    done: Bool[Array, "b"]
    history: TokenHistory
    dial: DialState | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes while the engine runs.

    Attributes:
      cache: Keys and values of all texts and of the kept prefixes.
      slots: One row for each slot.
    """

    cache: PagedCache
    slots: Slots

    @classmethod
    def create(
        cls, cache: PagedCache, config: ModelConfig, slots: int, pages_per_slot: int, stop: int, graded: bool
    ) -> "DecodeState":
        """Returns a state of empty slots with room for ``stop`` stop tokens each."""
        settings = Settings(
            sampling=sampling_rows(slots, config.vocab_size),
            bits=jnp.zeros(slots, jnp.float32),
            stop_tokens=jnp.full((slots, stop), NO_TOKEN, jnp.int32),
            limits=jnp.zeros(slots, jnp.int32),
        )
        rows = Slots(
            settings=settings,
            pages=jnp.full((slots, pages_per_slot), cache.num_pages, jnp.int32),
            lengths=jnp.zeros(slots, jnp.int32),
            last=jnp.zeros(slots, jnp.int32),
            done=jnp.ones(slots, bool),
            history=TokenHistory(
                jnp.zeros((slots, config.vocab_size), bool), jnp.zeros((slots, config.vocab_size), jnp.int32)
            ),
            dial=DialState.create(jnp.zeros(slots, jnp.float32)) if graded else None,
        )
        return cls(cache, rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt of which prefill has read the leading tokens.

    Attributes:
      pages: int32 ``[1, pages_per_slot]``, pages of the whole text, the answer included.
      length: int32 ``[1]``, number of tokens read.
      logits: float32 ``[1, V]`` after the last token read.
      preview: Preview of the end of what was read; None for a dense model.
    """

    pages: Int[Array, "1 pages_per_slot"]
    length: Int[Array, "1"]
    logits: Float[Array, "1 v"]
    preview: engine.Preview | None

    @classmethod
    def create(cls, config: ModelConfig, pages: Any, length: int, graded: bool) -> "Prefix":
        """Returns a prefix as numpy arrays.

        Args:
          config: Configuration of the model.
          pages: int32 ``[pages_per_slot]``, numpy.
          length: Number of tokens in shared pages.
          graded: Whether the model is graded.
        """

        def zeros(*shape, dtype=np.float32):
            return np.zeros(shape, dtype)

        previewed = zeros(1, engine.PREVIEW_TOKENS, len(linear_names(config)))
        preview = engine.Preview(previewed, zeros(1, dtype=np.int32)) if graded else None
        read: Any = np.array([length], np.int32)
        return cls(pages[None], read, zeros(1, config.vocab_size), preview)


@jax.jit(donate_argnames="cache")
def prefill(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    true_length: Int[Array, "1"],
    dial: Dial | None,
    bits: Float[Array, "1"],
) -> tuple[PagedCache, Prefix]:
    """Reads the next piece of a prompt at full precision.

    Args:
      model: Graded model; or a dense one, with ``dial=None``.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Next tokens, right-padded with any valid token.
      true_length: Number of tokens without padding.
      dial: Dial of the model; its state is ignored.
      bits: Wanted mean bits, for the preview.

    Returns:
      The pages, with the keys and values of the new tokens, and the longer prefix.
    """
    text = cache.texts(prefix.pages, prefix.length)
    if dial is None:
        logits, text = engine.prefill(model, tokens, true_length, text)
        preview = None
    else:
        thresholds = dial.with_state(DialState.create(bits)).thresholds
        logits, text, preview = engine.prefill_with_preview(model, tokens, true_length, text, thresholds)
        assert prefix.preview is not None, "a graded model has previews"
        preview = engine.merge_previews(prefix.preview, preview)
    return PagedCache.of(text), Prefix(prefix.pages, text.lengths, logits, preview)


@jax.jit(donate_argnames="cache")
def prompt_logprobs(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    following: Int[Array, "1 t"],
) -> tuple[PagedCache, TokenLogprobs]:
    """Returns the log-probabilities of the prompt tokens after those of a piece, before ``prefill`` reads it.

    Args:
      model: Graded or dense model.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Tokens of the piece, right-padded with any valid token.
      following: Token after each of them.
    """
    text = cache.texts(prefix.pages, prefix.length)
    count = most_logprobs(prefix.logits.shape[-1])
    logprobs, text = engine.prompt_logprobs(model, tokens, following, text, count)
    return PagedCache.of(text), logprobs


@jax.jit(static_argnames="policy", donate_argnames="state")
def insert(
    state: DecodeState,
    slot: Int[Array, ""],
    prefix: Prefix,
    settings: Settings,
    in_prompt: Bool[Array, "1 v"],
    dial: Dial | None,
    *,
    policy: DecodePolicy,
) -> tuple[DecodeState, engine.Chunk]:
    """Chooses the first token after a prompt and starts the answer in a slot.

    Args:
      state: State of all slots. Donated.
      slot: Index of an empty slot.
      prefix: The whole prompt.
      settings: Settings of the request.
      in_prompt: Whether the prompt has each token.
      dial: Dial of the model; its state is ignored.
      policy: Policy of the device.

    Returns:
      The state, and the first token as a chunk of one row and one step, with log-probabilities.
    """
    history = TokenHistory(in_prompt, jnp.zeros(in_prompt.shape, jnp.int32))
    if dial is not None:
        dial = dial.with_state(DialState.create(settings.bits))
    first, history, dial = engine.first_tokens(
        prefix.logits, prefix.preview, prefix.length, settings.sampling, history, dial, policy=policy
    )
    limits = settings.limits - 1
    row = Slots(
        settings=dataclasses.replace(settings, limits=limits),
        pages=prefix.pages,
        lengths=prefix.length,
        last=first,
        done=(limits <= 0) | jnp.any(first[:, None] == settings.stop_tokens, axis=-1),
        history=history,
        dial=None if dial is None else dial.state,
    )
    slots = jax.tree.map(lambda rows, new: rows.at[slot].set(new[0]), state.slots, row)
    logprobs = token_logprobs(prefix.logits, first, most_logprobs(prefix.logits.shape[-1]))
    chunk = engine.Chunk(
        tokens=first[:, None],
        counts=jnp.ones(1, jnp.int32),
        last=first,
        done=row.done,
        grading_stats=None,
        logprobs=jax.tree.map(lambda array: array[None], logprobs),
    )
    return DecodeState(state.cache, slots), chunk


@jax.jit(static_argnames=("policy", "greedy", "logprobs"), donate_argnames="state")
def generate(
    model: FlatModel,
    state: DecodeState,
    dial: Dial | None,
    *,
    policy: DecodePolicy,
    greedy: bool,
    logprobs: bool,
) -> tuple[DecodeState, engine.Chunk]:
    """Decodes up to ``policy.chunk_steps`` tokens for every slot that is not done.

    Args:
      model: Graded model; or a dense one, with ``dial=None``.
      state: State of all slots. Donated.
      dial: Dial of the model; its state is ignored.
      policy: How the loop is compiled.
      greedy: Whether all slots that are not done decode greedily, without penalties and biases. The program
        then neither sorts nor penalizes. It chooses the same tokens as the other one.
      logprobs: Whether to return log-probabilities.

    Returns:
      The state, and the new tokens with their grading statistics.
    """
    slots, settings = state.slots, state.slots.settings
    sampling, history = settings.sampling, slots.history
    if greedy:
        sampling = dataclasses.replace(sampling, greedy=True, penalties=None, logit_bias=None)
    if dial is not None:
        assert slots.dial is not None, "a graded model has a dial"
        dial = dial.with_state(slots.dial)
    chunk, texts = engine.jitted_decode_chunk(
        model,
        slots.last,
        slots.done,
        state.cache.texts(slots.pages, slots.lengths),
        dial,
        sampling,
        settings.stop_tokens,
        settings.limits,
        steps=policy.chunk_steps,
        policy=policy,
        history=None if greedy else history,
        top_logprobs=most_logprobs(history.generated.shape[1]) if logprobs else None,
    )
    slots = dataclasses.replace(
        slots,
        settings=dataclasses.replace(settings, limits=settings.limits - chunk.counts),
        lengths=texts.lengths,
        last=chunk.last,
        done=chunk.done,
        history=history if chunk.history is None else chunk.history,
        dial=chunk.dial,
    )
    return DecodeState(PagedCache.of(texts), slots), dataclasses.replace(chunk, history=None, dial=None)


def most_logprobs(vocabulary: int) -> int:
    """Returns the number of most likely tokens whose log-probabilities are computed."""
    return min(MOST_LOGPROBS, vocabulary)


@jax.jit(donate_argnames="state")
def free(state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Ends the answer in a slot. Its pages may then be given to other texts."""
    slots = state.slots
    slots = dataclasses.replace(
        slots,
        pages=slots.pages.at[slot].set(state.cache.num_pages),
        lengths=slots.lengths.at[slot].set(0),
        done=slots.done.at[slot].set(True),
    )
    return DecodeState(state.cache, slots)


@jax.jit(donate_argnames="state")
def turn(state: DecodeState, slot: Int[Array, ""], bits: Float[Array, ""]) -> DecodeState:
    """Changes the wanted mean bits of an answer, from its next decode chunk on."""
    assert state.slots.dial is not None, "a dense model has no dial"
    dial = dataclasses.replace(state.slots.dial, wanted=state.slots.dial.wanted.at[slot].set(bits))
    return DecodeState(state.cache, dataclasses.replace(state.slots, dial=dial))
