"""Drafters that ask a model: the target itself at fewer bits, or another, smaller model.

Both decode with the random numbers of the target, so that a sampled draft is often the token that the target
samples. Their thresholds are fixed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.engine.step import read_tokens
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.decoding.sampling import Sampling, choose_tokens
from grinqh_jax.decoding.speculation.drafter import (
    Draft,
    DrafterState,
    Stateless,
    Target,
    Texts,
    Verified,
)
from grinqh_jax.decoding.thresholds import StackedThresholds, Thresholds
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.sharding.program import zeros_on_mesh

MOST_READ = 8
"""Largest number of tokens of a text that a draft model reads before it drafts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfDrafter(Stateless):
    """Drafts with the target at fewer bits.

    It shares the cache of the target: it attends to the target's keys and values, and its own are overwritten
    by the verification. So it reads no prompt and needs no memory.

    Attributes:
      thresholds: Thresholds of the drafts, the same for all texts.
    """

    thresholds: StackedThresholds

    def propose(
        self, state: DrafterState, target: Target, texts: Texts, count: int
    ) -> tuple[Draft, DrafterState, KVCache]:
        """Drafts ``count`` tokens for each text."""
        last = jnp.take_along_axis(texts.tokens, texts.lengths[:, None] - 1, axis=1)[:, 0]
        lengths = target.cache.lengths
        tokens, cache = _decode(target.model, target.cache, last, self.thresholds.by_name(), target, count)
        return Draft(tokens, jnp.full(len(last), count)), state, cache.rollback(lengths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """Drafts with another model of the same vocabulary, in a cache with the pages of the target.

    The rows of its state are the numbers of tokens in its cache. Before it drafts, it reads the tokens that
    it does not have, at most ``MOST_READ`` in a step; if there are more, it has no draft in this step.

    Attributes:
      model: The draft model, on the devices of the target.
      thresholds: Its thresholds, the same for all texts; None for a dense model.
      config: Configuration of its cache (``Decoder.cache_config``).
      dtype: Dtype of its keys and values.
    """

    model: FlatModel
    thresholds: StackedThresholds | None
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    reads_prompts = True

    def create(self, texts: int, num_pages: int, page_size: int) -> DrafterState:
        """Returns an empty cache."""
        sizes = num_pages, page_size, self.dtype, None
        cache = zeros_on_mesh(lambda: PagedCache.create(self.config, *sizes), self.model.partition)
        return DrafterState(np.zeros(texts, np.int32), cache)

    def prefill(
        self,
        shared: PagedCache,
        pages: Int[Array, "1 pages_per_slot"] | None,
        length: Int[Array, "1"],
        tokens: Int[Array, "1 t"],
        true_length: Int[Array, "1"],
    ) -> PagedCache:
        """Reads a prefill chunk at full precision."""
        _, text = engine.prefill(self.model, tokens, true_length, shared.texts(pages, length, {}))
        return PagedCache.of(text)

    def begin(self, length: Int[Array, "1"]) -> Int[Array, "1"]:
        """Returns the number of tokens in the cache: those of the prompt."""
        return length

    def propose(
        self, state: DrafterState, target: Target, texts: Texts, count: int
    ) -> tuple[Draft, DrafterState, KVCache]:
        """Drafts up to ``count`` tokens for each text."""
        model = decoder_of(self.model)
        thresholds = None if self.thresholds is None else self.thresholds.by_name()
        batch, slots = texts.tokens.shape
        width = min(MOST_READ, max(MAX_GRADED_ROWS // batch, 1))
        # The last token is always read, for the logits after it.
        start = jnp.minimum(state.rows, texts.lengths - 1)
        positions = start[:, None] + jnp.arange(width)
        unread = jnp.take_along_axis(texts.tokens, jnp.minimum(positions, slots - 1), axis=1)
        counts = jnp.minimum(texts.lengths - start, width)
        cache = state.shared.texts(texts.pages, start, {})
        _, outputs, cache, _ = read_tokens(model, unread, cache, thresholds, counts)
        last = jnp.take_along_axis(outputs, (counts - 1)[:, None, None], axis=1)[:, 0]
        first = _choose(model, last, target, texts.lengths)
        ready = start + counts == texts.lengths
        rest, cache = _decode(model, cache, first, thresholds, target, count - 1)
        tokens = jnp.concatenate([first[:, None], rest], axis=1)
        known = jnp.where(ready, cache.lengths, start + counts)
        state = DrafterState(known, PagedCache.of(cache))
        return Draft(tokens, jnp.where(ready, count, 0)), state, target.cache

    def follow(self, state: DrafterState, verified: Verified) -> DrafterState:
        """Forgets the drafts that were not accepted."""
        known = jnp.minimum(state.rows, verified.texts.lengths - 1)
        return dataclasses.replace(state, rows=known)


def _decode(
    model: Decoder,
    cache: KVCache,
    token: Int[Array, "b"],
    thresholds: Thresholds | None,
    target: Target,
    count: int,
) -> tuple[Int[Array, "b count"], KVCache]:
    """Returns ``count`` tokens after one that is not in the cache, and the cache with all but the last."""
    if count == 0:
        return jnp.zeros((len(token), 0), jnp.int32), cache
    ones = jnp.ones_like(token)

    def one(i: Any, loop: Any) -> Any:
        token, tokens, cache = loop
        _, outputs, cache, _ = read_tokens(model, token[:, None], cache, thresholds, ones)
        token = _choose(model, outputs[:, 0], target, cache.lengths)
        return token, tokens.at[:, i].set(token), cache

    loop = token, jnp.zeros((len(token), count), jnp.int32), cache
    _, tokens, cache = jax.lax.fori_loop(0, count, one, loop)
    return tokens, cache


def _choose(
    model: Decoder, outputs: jax.Array, target: Target, positions: Int[Array, "b"]
) -> Int[Array, "b"]:
    """Returns the tokens that the sampling of the target chooses, without its penalties."""
    sampling: Sampling = dataclasses.replace(target.sampling, penalties=None, allowed=None)
    head = model.lm_head
    return choose_tokens(
        outputs, sampling, positions, target.policy, token_ids=head.tokens(), in_order=head.in_order
    )
