"""The key-value cache that a conversation keeps from one generation to the next.

Only keys and values that a full-precision prefill wrote are reused. Graded decoding writes less exact ones,
so the answer is read again, at full precision, as part of the next prompt. Reuse therefore does not change
the text. It can change the last bits of logits, because the order of additions in a matrix product may depend
on the number of tokens that are read in one call.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import KeyValues, KVCache
from grinqh_jax.model.decoder import Decoder

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
        self._cache: KVCache | None = None
        self._model: Decoder | None = None
        self._user: object | None = None

    def clear(self) -> None:
        """Forgets all tokens and frees the memory of their keys and values."""
        if self._cache is not None:
            _delete(self._cache)
        self.tokens, self._cache, self._model, self._user = (), None, None, None

    def acquire(
        self, user: object, model: Decoder, prompt: Sequence[int], capacity: int, read_from: int
    ) -> tuple[KVCache, int]:
        """Gives the cache to a generation, and takes it from an earlier one.

        Args:
          user: Generation that uses the cache from now on; ``store`` and ``check`` recognize it.
          model: Model of the generation.
          prompt: Tokens of its prompt.
          capacity: Number of cache slots that it needs.
          read_from: First position of the prompt that it reads in any case.

        Returns:
          ``(cache, reused)``: a cache with at least ``capacity`` slots, and the number of leading prompt
          tokens whose keys and values are in it.

        Raises:
          UsageError: The cache holds keys and values of another model.
        """
        if self._model is not None and self._model is not model:
            raise UsageError(
                "the prompt cache belongs to another model; make one for each model, or clear it"
            )
        reused = min(_common_prefix(self.tokens, prompt), read_from) if self._is_whole() else 0
        if not reused:
            self.clear()
        cache = self._cache
        self.tokens, self._cache, self._model, self._user = (), None, model, user
        if cache is None:
            cache = KVCache.create(model.config, 1, capacity, model.compute_dtype)
        elif cache.capacity < capacity:
            cache = _grown(cache, capacity)
        cache = cache.updated(cache.layers, jnp.full(1, reused, jnp.int32))
        self._cache = jax.device_put(cache, model.norm.scale[...].sharding)
        self.tokens = tuple(prompt[:reused])
        return self._cache, reused

    def store(self, user: object, cache: KVCache, prefilled: Sequence[int] | None = None) -> None:
        """Keeps the cache that a call of the engine returned.

        Args:
          user: The generation that made the call.
          cache: Returned cache, in which the keys and values of ``tokens`` are unchanged.
          prefilled: All tokens that full-precision prefills have written; None if the call was no prefill.

        Raises:
          UsageError: As ``check``.
        """
        self.check(user)
        self._cache = cache
        if prefilled is not None:
            self.tokens = tuple(prefilled)

    def check(self, user: object) -> None:
        """Raises UsageError if a later generation has acquired the cache, or ``clear`` was called."""
        if self._user is not user:
            raise UsageError(
                "the prompt cache of this generation was passed to a later one or cleared; finish a "
                "generation before the next, or give each its own prompt cache"
            )

    def invalidate(self, user: object) -> None:
        """Clears the cache after an error of ``user``, unless a later generation has acquired it.

        A failed computation leaves arrays that raise its error again wherever they are used.
        """
        if self._user is user:
            self.clear()

    def _is_whole(self) -> bool:
        """Whether the arrays exist. An interrupt between their donation and ``store`` leaves them deleted."""
        return self._cache is not None and not any(a.is_deleted() for a in jax.tree.leaves(self._cache))


def conversation_capacity(needed: int) -> int:
    """Returns the number of slots of a cache with ``few_sizes`` that holds ``needed`` tokens."""
    capacity = SMALLEST_CONVERSATION
    while capacity < needed:
        capacity *= 2
    return capacity


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(np.argmax(differs)) if differs.any() else length


def _grown(cache: KVCache, capacity: int) -> KVCache:
    """Copies a cache into one with more slots, and deletes the old one layer by layer to save memory."""
    layers, extra = [], capacity - cache.capacity
    for layer in cache.layers:
        layers.append(KeyValues(_with_slots(layer.keys, extra), _with_slots(layer.values, extra)))
        _delete(layer)
    return cache.updated(layers, cache.lengths)


def _delete(tree: KVCache | KeyValues) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()


@jax.jit(static_argnums=1)
def _with_slots(array: Float[Array, "b s heads d"], extra: int) -> Float[Array, "b more_slots heads d"]:
    return jnp.pad(array, ((0, 0), (0, extra), (0, 0), (0, 0)))
