"""The state of all texts on the device: their pages, and a row for each slot."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.engine.chunk import Chunk
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.penalties import TokenHistory
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.speculation.chunk import SlotTexts
from grinqh_jax.decoding.speculation.drafter import Drafter, DrafterState
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.fixed_states import FixedStates, fixed_states
from grinqh_jax.sharding.program import zeros_on_mesh


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

    def of(self, rows: Int[Array, "n"] | None) -> "Slots":
        """Returns the rows of some slots; None for all."""
        return self if rows is None else jax.tree.map(lambda slots: slots[rows], self)

    def updated(self, rows: Int[Array, "n"] | None, before: "Slots", after: "Slots") -> "Slots":
        """Returns all slots, once what ``of(rows)`` returned has become ``after``."""
        if rows is None:
            return after

        def write(slots, old, new):
            return slots if new is old else slots.at[rows].set(new, unique_indices=True)

        return jax.tree.map(write, self, before, after)

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

    def after(self, chunk: Chunk, cache: KVCache) -> "Slots":
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
        model: Decoder,
        shape: Shape,
        settings: Settings,
        *,
        graded: bool,
        cache: PagedCache | None = None,
        drafter: Drafter | None = None,
    ) -> "DecodeState":
        """Returns a state of empty slots, whose rows are numpy arrays.

        Args:
          model: Model of the texts.
          shape: Sizes of the engine.
          settings: Settings of one request. Those of all requests have the same structure and shapes.
          graded: Whether texts are graded.
          cache: Pages of all texts, by default empty ones.
          drafter: Drafter of speculation; None without.
        """
        config, dtype, slots = model.cache_config, model.compute_dtype, shape.slots
        if cache is None:
            sizes = shape.num_pages, shape.page_size, dtype, shape.ring_context
            cache = zeros_on_mesh(lambda: PagedCache.create(config, *sizes), model.partition)
        fixed = zeros_on_mesh(lambda: fixed_states(config, slots, dtype, shape.ring_context), model.partition)

        # numpy arrays, because each jax array would be a separate dispatch.
        def full(value: Any, *shape: int, dtype: Any = np.int32) -> Any:
            return np.full((slots, *shape), value, dtype)

        history = None
        if settings.sampling.penalties is not None:
            history = TokenHistory(full(0, model.config.vocab_size))
        drafts, texts = DrafterState(), None
        if drafter is not None:
            drafts = drafter.create(slots, cache.num_pages, cache.page_size)
            capacity = cache.page_size * (1 if shape.contiguous else shape.pages_per_slot)
            texts = SlotTexts(full(0, capacity), full(0, 4, dtype=np.float32))
        rows = Slots(
            settings=jax.tree.map(lambda row: full(0, *row.shape[1:], dtype=row.dtype), settings),
            pages=None if shape.contiguous else full(cache.num_pages, shape.pages_per_slot),
            lengths=full(0),
            last=full(0),
            done=full(True, dtype=bool),
            history=history,
            dial=DialState(full(0, dtype=np.float32), full(0, 4, dtype=np.float32)) if graded else None,
            fixed=fixed,
            texts=texts,
            drafter=drafts.rows,
        )
        return cls(cache, rows, drafts.shared)
