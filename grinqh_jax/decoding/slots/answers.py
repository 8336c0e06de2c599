"""Programs on the state of all slots: they start answers, decode them together, and end them.

Only ``generate`` takes the pages, 72 arrays of Qwen3-8B: each array of a program takes the host about 10 us
(jax 0.11.2).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.engine.chunk import Chunk, jitted_decode_chunk
from grinqh_jax.decoding.engine.first_tokens import first_tokens
from grinqh_jax.decoding.logprobs import token_logprobs
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.programs import LAUNCHED_ONE_BY_ONE
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.state import DecodeState, Slots
from grinqh_jax.decoding.speculation.chunk import SlotTexts
from grinqh_jax.decoding.speculation.drafter import Drafter
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh


@jax.jit(
    static_argnames=("policy", "top_logprobs"),
    donate_argnames="slots",
    compiler_options=LAUNCHED_ONE_BY_ONE,
)
def insert(
    slots: Slots,
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
) -> tuple[Slots, Chunk]:
    """Chooses the first token after a prompt and starts the answer in a slot.

    Args:
      slots: All slots. Donated.
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
      The slots, and the first token as a chunk of one row and one step.
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
        pages=None if slots.pages is None else prefix.pages,
        lengths=prefix.length,
        last=first,
        done=(limits <= 0) | jnp.any(first[:, None] == settings.stop_tokens, axis=-1),
        history=history,
        dial=None if dial is None else dial.state,
        fixed=prefix.fixed,
        texts=texts,
        drafter=drafts,
    )
    if len(slots.last) == 1:
        slots = row
    else:
        slots = jax.tree.map(lambda rows, new: rows.at[slot].set(new[0]), slots, row)
    logprobs = None
    if top_logprobs is not None:
        logprobs = token_logprobs(prefix.logits, first, top_logprobs)
    chunk = Chunk(
        tokens=first[:, None],
        counts=jnp.ones(1, jnp.int32),
        last=first,
        done=row.done,
        grading_stats=None,
        logprobs=jax.tree.map(lambda array: array[None], logprobs),
    )
    return slots, chunk


@jax.jit(static_argnames=("policy", "steps", "greedy", "top_logprobs", "level"), donate_argnames="state")
@on_mesh
def generate(
    model: FlatModel,
    state: DecodeState,
    dial: Dial | None,
    rows: Int[Array, "n"] | None = None,
    allowed: UInt32[Array, "n words"] | None = None,
    *,
    policy: DecodePolicy,
    steps: int,
    greedy: bool,
    top_logprobs: int | None,
    level: int | None = None,
) -> tuple[DecodeState, Chunk]:
    """Decodes up to ``steps`` tokens for some slots, as far as they are not done.

    Args:
      model: Graded model; or a dense one, with ``dial=None``.
      state: State of all slots. Donated.
      dial: Dial of the model; its state is ignored.
      rows: Slots, each at most once; None for all slots, as in a contiguous cache.
      allowed: Tokens that each of these slots may choose (see ``sampling.Sampling``), for chunks of one step;
        None for all.
      policy: How the loop is compiled.
      steps: Number of steps.
      greedy: Whether all of these slots that are not done decode greedily, without penalties and biases. The
        program then neither sorts nor penalizes. It chooses the same tokens as the other one.
      top_logprobs: Number of most likely tokens whose log-probabilities are returned beside those of the new
        tokens; None for no log-probabilities.
      level: As in ``engine.decode_chunk``.

    Returns:
      The state, and the new tokens with their grading statistics, a row for each of ``rows``.
    """
    slots = state.slots.of(rows)
    chunk, texts = jitted_decode_chunk(
        model,
        slots.last,
        slots.done,
        state.cache.texts(slots.pages, slots.lengths, slots.fixed),
        slots.dial_of(dial),
        slots.sampling(greedy, allowed),
        slots.settings.stop_tokens,
        slots.settings.limits,
        steps=steps,
        policy=policy,
        history=None if greedy else slots.history,
        top_logprobs=top_logprobs,
        level=level,
    )
    after = state.slots.updated(rows, slots, slots.after(chunk, texts))
    state = dataclasses.replace(state, cache=PagedCache.of(texts), slots=after)
    return state, dataclasses.replace(chunk, history=None, dial=None)


@jax.jit(static_argnames="num_pages", donate_argnames="slots")
def free(slots: Slots, slot: Int[Array, ""], *, num_pages: int) -> Slots:
    """Ends the answer in a slot. Its pages, of ``num_pages`` in all, may then be given to other texts."""
    # Decode chunks read and write the cache of every slot. An empty one has no length, so its attention costs
    # nothing. Its write is dropped if it has no page; in a contiguous cache the next prompt overwrites it,
    # because a prompt is read as a whole between two chunks (``texts``).
    return dataclasses.replace(
        slots,
        pages=None if slots.pages is None else slots.pages.at[slot].set(num_pages),
        lengths=slots.lengths.at[slot].set(0),
        done=slots.done.at[slot].set(True),
    )


@jax.jit(donate_argnames="slots")
def turn(slots: Slots, slot: Int[Array, ""], bits: Float[Array, ""]) -> Slots:
    """Changes the wanted mean bits of an answer, from its next decode chunk on."""
    assert slots.dial is not None, "a dense model has no dial"
    dial = dataclasses.replace(slots.dial, wanted=slots.dial.wanted.at[slot].set(bits))
    return dataclasses.replace(slots, dial=dial)
