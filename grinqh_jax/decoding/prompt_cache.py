"""The key-value cache that a conversation keeps from one generation to the next.

Only keys and values that a full-precision prefill wrote are reused. Graded decoding writes less exact ones,
so the answer is read again, at full precision, as part of the next prompt. Reuse therefore does not change
the text. It can change the last bits of logits, because the order of additions in a matrix product may depend
on the number of tokens that are read in one call.

A recurrent state tells nothing about fewer tokens than it has read. So the cache remembers the states after
the last prefill chunks of a prompt, and the next prompt reuses a prefix that ends there.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, cut, cut_conversation
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.errors import UsageError
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.fixed_states import FixedStates

SNAPSHOTS = 2
"""Number of prefill chunks after which recurrent states are remembered: the one before the preview, which
the next turn can always reuse, and the last one."""

SMALLEST_CONVERSATION = 1024
"""Number of slots of the smallest cache with ``few_sizes``."""


class PromptCache:
    """Keys and values of the last prompt of a conversation (see ``Generator.generate``).

    A cache belongs to one model, and one generation uses it at a time. It stays usable after an error, an
    interrupt or an abandoned generation: the next generation reads the missing tokens again.

    Args:
      few_sizes: Whether prompts are read in buckets of only two widths, and the cache doubles when it is
        full, so that a conversation of many turns needs few programs. In return a turn takes longer to read,
        up to twice as long on a GPU, and the cache is up to twice as large.

    Attributes:
      few_sizes: Whether buckets and cache have few sizes (see the argument).
      tokens: Tokens whose keys and values a full-precision prefill wrote, from position 0 on.
    """

    def __init__(self, *, few_sizes: bool = False):
        self.few_sizes = few_sizes
        self.tokens: tuple[int, ...] = ()
        self._device: Device | None = None
        self._model: Decoder | None = None
        self._snapshots: dict[int, FixedStates] = {}  # by number of tokens read

    def clear(self) -> None:
        """Forgets all tokens and frees the memory of their keys and values."""
        if self._device is not None:
            _delete(self._device.cache)
        self.tokens, self._device, self._model, self._snapshots = (), None, None, {}

    @property
    def capacity(self) -> int:
        """Number of tokens that the cache has room for, 0 if it is empty."""
        return 0 if self._device is None else self._device.cache.page_size

    def acquire(
        self, model: Decoder, prompt: Sequence[int], capacity: int, read_from: int
    ) -> PagedCache | None:
        """Takes the cache from the generation that has it, for another one, which then calls ``give``.

        Args:
          model: Model of the generation.
          prompt: Tokens of its prompt.
          capacity: Number of tokens that it needs room for.
          read_from: First position of the prompt that it reads in any case.

        Returns:
          A cache of one page with at least ``capacity`` positions, in which the keys and values of ``tokens``
          are those of the prompt; None if nothing is reused.

        Raises:
          UsageError: The cache holds keys and values of another model.
        """
        if self._model is not None and self._model is not model:
            raise UsageError(
                "the prompt cache belongs to another model; make one for each model, or clear it"
            )
        reused = min(_common_prefix(self.tokens, prompt), read_from) if self._is_whole() else 0
        if model.config.is_recurrent:
            reused = max((end for end in self._snapshots if end <= reused), default=0)
        if not reused:
            self.clear()
        self.tokens, self._model = tuple(prompt[:reused]), model
        self._snapshots = {end: states for end, states in self._snapshots.items() if end <= reused}
        cache = None if self._device is None else self._device.cache
        self._device = None
        return cache if cache is None or cache.page_size >= capacity else _grown(cache, capacity)

    def give(self, device: Device) -> None:
        """Gives the cache to the generation that runs on a device."""
        self._device = device

    def check(self, device: Device) -> None:
        """Raises UsageError if a later generation has acquired the cache, or ``clear`` was called."""
        if self._device is not device:
            raise UsageError(
                "the prompt cache of this generation was passed to a later one or cleared; finish a "
                "generation before the next, or give each its own prompt cache"
            )

    def invalidate(self, device: Device) -> None:
        """Clears the cache after an error, unless a later generation has acquired it.

        A failed computation leaves arrays that raise its error again wherever they are used.
        """
        if self._device is device:
            self.clear()

    # The methods of ``Storage``.

    def reserve(self, job: Job) -> int:
        """Gives the only page to a job; returns the number of reused tokens."""
        job.pages, job.fixed = [0], self._snapshots.get(len(self.tokens))
        return len(self.tokens)

    def cut(self, job: Job, start: int) -> Iterator[PrefillBucket]:
        """Yields the buckets of a prompt, of few widths if the cache has few sizes."""
        return cut_conversation(job.prompt, start) if self.few_sizes else cut([job.prompt], start)

    def keep(self, job: Job, end: int) -> None:
        """Remembers the tokens that prefills have read, and the states after them."""
        self.tokens = tuple(job.prompt[:end])
        if job.prefix is not None and job.prefix.fixed:
            self._snapshots[end] = job.prefix.fixed
            for oldest in sorted(self._snapshots)[:-SNAPSHOTS]:
                del self._snapshots[oldest]

    def release(self, job: Job) -> None:
        """Does nothing: the page stays, for the next generation."""

    def _is_whole(self) -> bool:
        """Whether the arrays exist. An interrupt between a donation and the result leaves them deleted."""
        return self._device is not None and not any(
            array.is_deleted() for array in jax.tree.leaves(self._device.cache)
        )


def conversation_capacity(needed: int) -> int:
    """Returns the number of positions of a cache with ``few_sizes`` that holds ``needed`` tokens."""
    capacity = SMALLEST_CONVERSATION
    while capacity < needed:
        capacity *= 2
    return capacity


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(np.argmax(differs)) if differs.any() else length


def _grown(cache: PagedCache, capacity: int) -> PagedCache:
    """Copies a cache into one with a larger page, and deletes the old one array by array to save memory."""
    extra = capacity - cache.page_size

    def grown(arrays):
        for array in arrays:
            yield _with_positions(array, extra)
            array.delete()

    return PagedCache(tuple(grown(cache.keys)), tuple(grown(cache.values)))


def _delete(cache: PagedCache) -> None:
    for array in jax.tree.leaves(cache):
        array.delete()


@jax.jit(static_argnums=1)
def _with_positions(array: Float[Array, "page s heads d"], extra: int) -> Float[Array, "page more heads d"]:
    return jnp.pad(array, ((0, 0), (0, extra), (0, 0), (0, 0)))
