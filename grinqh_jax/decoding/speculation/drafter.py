"""The protocol of drafters. A drafter runs on the device, inside the decode loop."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens that may follow each text.

    Attributes:
      tokens: int32 ``[B, k]``.
      counts: int32 ``[B]``, number of leading tokens that are drafts; later ones are padding.
      probabilities: float32 ``[B, k, V]``, the distributions that the tokens were sampled from, for the
        rejection rule. None if the drafter did not sample, or with the random numbers of the target: a draft
        is then accepted if the target chooses the same token.
    """

    tokens: Int[Array, "b k"]
    counts: Int[Array, "b"]
    probabilities: Float[Array, "b k v"] | None = None


class Texts(NamedTuple):
    """The texts that a drafter continues.

    Attributes:
      tokens: int32 ``[B, S]``, prompt and answer of each text.
      lengths: int32 ``[B]``, number of tokens; later entries of ``tokens`` are padding.
      pages: int32 ``[B, pages_per_slot]``, pages of each text; None for contiguous caches.
    """

    tokens: Int[Array, "b s"]
    lengths: Int[Array, "b"]
    pages: Int[Array, "b pages_per_slot"] | None


class Target(NamedTuple):
    """The model that verifies the drafts.

    Attributes:
      model: The model.
      cache: Keys and values of all tokens of the texts but the last.
      sampling: Sampling parameters of each text.
      policy: Policy of the device.
    """

    model: Decoder
    cache: KVCache
    sampling: Sampling
    policy: DecodePolicy


class Verified(NamedTuple):
    """The result of a verification.

    Attributes:
      hidden: Hidden states ``[B, k + 1, d]`` of the target after its final norm, at the last token and the
        drafts.
      produced: int32 ``[B]``, number of new tokens; the first ``produced`` hidden states belong to the text.
      texts: The texts with the new tokens.
    """

    hidden: Float[Array, "b t d"]
    produced: Int[Array, "b"]
    texts: Texts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrafterState:
    """Memory of a drafter: pytrees that only the drafter knows, None if it remembers nothing.

    Attributes:
      rows: Arrays ``[B, ...]`` with a row for each text.
      shared: Arrays of all texts, such as a paged cache.
    """

    rows: Any = None
    shared: Any = None


class Stateless:
    """Methods of drafters that remember nothing."""

    reads_prompts = False

    def create(self, texts: int, num_pages: int, page_size: int) -> DrafterState:
        """Returns an empty state."""
        del texts, num_pages, page_size
        return DrafterState()

    def prefill(self, shared: Any, *prompt: jax.Array | None) -> Any:
        """Returns ``shared``, which is None."""
        del prompt
        return shared

    def begin(self, length: Int[Array, "1"]) -> Any:
        """Returns None."""
        del length

    def follow(self, state: DrafterState, verified: Verified) -> DrafterState:
        """Returns the state."""
        del verified
        return state


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens. A pytree of what does not change while texts are decoded, such as a draft model.

    What changes is the state. All methods but ``create`` are called in traced functions.

    Attributes:
      reads_prompts: Whether ``prefill`` does anything, because the drafter has a cache.
    """

    reads_prompts: bool

    def create(self, texts: int, num_pages: int, page_size: int) -> DrafterState:
        """Returns the state before the first text, numpy or jax arrays.

        Args:
          texts: Number of slots.
          num_pages, page_size: Sizes of the cache of the target. Pages of a text are those of its tokens in
            the drafter, too.
        """
        ...

    def prefill(
        self,
        shared: Any,
        pages: Int[Array, "1 pages_per_slot"] | None,
        length: Int[Array, "1"],
        tokens: Int[Array, "1 t"],
        true_length: Int[Array, "1"],
    ) -> Any:
        """Reads a prefill chunk (see ``slots.prompts.prefill``); returns ``shared`` after it."""
        ...

    def begin(self, length: Int[Array, "1"]) -> Any:
        """Returns the row of a text whose prompt of this length was read."""
        ...

    def propose(
        self, state: DrafterState, target: Target, texts: Texts, count: int
    ) -> tuple[Draft, DrafterState, KVCache]:
        """Drafts up to ``count`` tokens for each text.

        Returns:
          The draft ``[B, count]``, the state, and the cache of the target, in whose padding a drafter may
          write: it returns a cache that was rolled back to the lengths of ``target.cache``.
        """
        ...

    def follow(self, state: DrafterState, verified: Verified) -> DrafterState:
        """Returns the state after a verification. Drafters that read hidden states of the target use this."""
        ...
