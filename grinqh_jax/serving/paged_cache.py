"""The KV cache in pages, and the contiguous cache that attention reads.

The decode attention kernel reads a contiguous cache. Until it takes a page table, ``gather`` copies the pages
of all slots into a contiguous cache at the start of a call of the engine, and ``write`` copies the new
positions back at its end. A decode chunk thus copies the cache once and not at every step. The contiguous
cache exists during the call only, beside the pages.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig

FREE_MEMORY_SHARE = 0.8
"""Share of the free memory that pages and their copy may take; activations and logits need the rest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all texts.

    A row of pages lists the pages of a text in the order of their positions; entries beyond the text are
    ``num_pages``, which is no page.

    Attributes:
      keys, values: One array ``[pages, page_size, kv_heads, head_dim]`` for each layer, in the compute dtype.
    """

    keys: tuple[Float[Array, "pages page_size kv_heads head_dim"], ...]
    values: tuple[Float[Array, "pages page_size kv_heads head_dim"], ...]

    @classmethod
    def create(cls, config: ModelConfig, num_pages: int, page_size: int, dtype) -> "PagedCache":
        """Creates a cache of empty pages."""
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(empty_layers(), empty_layers())

    @property
    def num_pages(self) -> int:
        return self.keys[0].shape[0]

    @property
    def page_size(self) -> int:
        """Number of positions of a page."""
        return self.keys[0].shape[1]

    def gather(self, rows: Int[Array, "b pages_per_row"], lengths: Int[Array, "b"]) -> KVCache:
        """Copies the pages of texts into a contiguous cache.

        Args:
          rows: Pages of each text.
          lengths: Number of tokens of each text. Slots beyond it are zero, so that no text depends on the
            texts that used its pages before.

        Returns:
          A cache of ``pages_per_row * page_size`` slots for each text.
        """
        valid = jnp.arange(rows.shape[1] * self.page_size) < lengths[:, None]

        def contiguous(pages):
            slots = pages.at[rows].get(mode="fill", fill_value=0)
            slots = slots.reshape(len(rows), -1, *pages.shape[2:])
            return jnp.where(valid[..., None, None], slots, 0)

        keys, values = (tuple(map(contiguous, layers)) for layers in (self.keys, self.values))
        return KVCache(keys, values, lengths)

    def write(
        self, cache: KVCache, rows: Int[Array, "b pages_per_row"], starts: Int[Array, "b"], most: int
    ) -> "PagedCache":
        """Copies the new positions of a contiguous cache into the pages of its texts.

        Args:
          cache: Cache that ``gather`` returned, after tokens were added.
          rows: Pages of each text, as in ``gather``.
          starts: Position of the first new token of each text; the last is that before ``cache.lengths``.
          most: Largest possible number of new tokens of a text.
        """
        positions = starts[:, None] + jnp.arange(most)
        written = positions < cache.lengths[:, None]
        page = jnp.take_along_axis(rows, jnp.minimum(positions // self.page_size, rows.shape[1] - 1), axis=1)
        page = jnp.where(written, page, self.num_pages)  # no page: the update is dropped
        offset = positions % self.page_size
        batch = jnp.arange(len(rows))[:, None]

        def updated(pages, slots):
            new = slots.at[batch, positions].get(mode="fill", fill_value=0)
            return pages.at[page, offset].set(new, mode="drop")

        return PagedCache(
            tuple(map(updated, self.keys, cache.keys)), tuple(map(updated, self.values, cache.values))
        )


def page_bytes(config: ModelConfig, page_size: int, dtype) -> int:
    """Returns the size of a page: keys and values of ``page_size`` positions of all layers."""
    heads = config.num_kv_heads * config.head_dim
    return 2 * config.num_layers * page_size * heads * jnp.dtype(dtype).itemsize


def count_pages(
    config: ModelConfig,
    dtype,
    *,
    slots: int,
    max_context: int,
    page_size: int,
    cache_memory: int | None,
    free: int | None,
) -> int:
    """Returns the number of pages of a cache.

    Args:
      config: Configuration of the model.
      dtype: Dtype of keys and values.
      slots: Number of texts that ``gather`` copies at once.
      max_context: Largest number of tokens of a text.
      page_size: Number of positions of a page.
      cache_memory: Bytes of all pages; None for ``slots`` texts, or fewer if memory ends first.
      free: Free bytes of the device; None if unknown.

    Raises:
      UsageError: The pages, or the copy of ``slots`` texts beside them, do not fit.
    """
    page, per_text = page_bytes(config, page_size, dtype), -(-max_context // page_size)
    pages, copy = slots * per_text, slots * per_text * page
    if cache_memory is not None:
        pages = cache_memory // page
        if pages < 1:
            raise UsageError(
                f"cache memory {cache_memory} B: a page of {page_size} tokens takes {page} B; give more"
            )
    if free is None:
        return pages
    room = int(FREE_MEMORY_SHARE * free - copy) // page
    if cache_memory is None:
        pages = max(min(pages, room), 1)
    if pages > room:
        raise UsageError(
            f"{slots} slots of {max_context} tokens take {copy} B, beside {pages * page} B of cache pages, "
            f"and {free} B are free; choose fewer slots, a smaller context or less cache memory"
        )
    return pages
