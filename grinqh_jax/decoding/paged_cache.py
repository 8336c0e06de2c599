"""The KV cache of the engine in pages, and how many of them fit into memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.fixed_states import FixedStates, fixed_bytes, whole_layers
from grinqh_jax.model.partition import AXIS

FREE_MEMORY_SHARE = 0.8
"""Share of the free memory that pages may take; activations and logits need the rest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all texts.

    A row of pages lists the pages of a text in the order of their positions; entries beyond the text are
    ``num_pages``, which is no page.

    Attributes:
      keys, values: One array ``[pages, page_size, kv_heads, head_dim]`` for each layer that keeps the
        whole context, in the compute dtype.
    """

    keys: tuple[Float[Array, "pages page_size kv_heads head_dim"], ...]
    values: tuple[Float[Array, "pages page_size kv_heads head_dim"], ...]

    @classmethod
    def create(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype, ring_context: int | None
    ) -> "PagedCache":
        """Creates a cache of empty pages (``ring_context``: see ``fixed_states``)."""
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)

        def empty_layers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(whole_layers(config, ring_context)))

        return cls(empty_layers(), empty_layers())

    def partition_specs(self) -> "PagedCache":
        """Returns the cut of each array on a mesh, as ``KVCache.partition_specs`` does."""
        heads = tuple(PartitionSpec(None, None, AXIS) for _ in self.keys)
        return PagedCache(heads, heads)  # type: ignore[arg-type]

    @property
    def num_pages(self) -> int:
        """Number of pages of all texts."""
        return self.keys[0].shape[0]

    @property
    def page_size(self) -> int:
        """Number of positions of a page."""
        return self.keys[0].shape[1]

    def texts(
        self,
        pages: Int[Array, "b pages_per_row"] | None,
        lengths: Int[Array, "b"],
        fixed: FixedStates,
    ) -> KVCache:
        """Returns the cache of some texts. It has the arrays of all pages.

        Args:
          pages: Pages of each text; None if text b has page b and no other.
          lengths: Number of tokens of each text.
          fixed: States of a fixed size of these texts. They are not in pages.
        """
        if pages is not None and pages.shape == (1, 1) and self.num_pages == 1:
            pages = None  # The only text has the only page.
        return KVCache(self.keys, self.values, lengths, pages, fixed)

    @classmethod
    def of(cls, cache: KVCache) -> "PagedCache":
        """Returns the pages after tokens were added to a cache that ``texts`` returned."""
        return cls(cache.keys, cache.values)


def page_bytes(config: ModelConfig, page_size: int, dtype, ring_context: int | None) -> int:
    """Returns the size of a page: ``page_size`` positions of all layers that keep the whole context."""
    heads = config.num_kv_heads * config.head_dim
    return 2 * whole_layers(config, ring_context) * page_size * heads * jnp.dtype(dtype).itemsize


def count_pages(
    config: ModelConfig,
    dtype,
    *,
    slots: int,
    max_context: int,
    page_size: int,
    cache_memory: int | None,
    free: int | None,
    share_prefixes: bool = True,
) -> int:
    """Returns the number of pages of a cache.

    Args:
      config: Configuration of the model.
      dtype: Dtype of keys and values.
      slots: Number of texts that are decoded at once.
      max_context: Largest number of tokens of a text.
      page_size: Number of positions of a page.
      cache_memory: Bytes of all pages; None for ``slots`` texts, or fewer if memory ends first.
      free: Free bytes of the device; None if unknown.
      share_prefixes: Whether texts share prefixes. If not, layers with windows keep rings.

    Raises:
      UsageError: The pages do not fit.
    """
    ring_context = None if share_prefixes else max_context
    page = page_bytes(config, page_size, dtype, ring_context)
    pages = slots * -(-max_context // page_size)
    if cache_memory is not None:
        pages = cache_memory // page
        if pages < 1:
            raise UsageError(
                f"cache memory {cache_memory} B: a page of {page_size} tokens takes {page} B; give more"
            )
    if free is None:
        return pages
    # Each slot has states of a fixed size, and so have the prompt that is read and the empty prefix.
    free = max(free - (slots + 2) * fixed_bytes(config, dtype, ring_context), 0)
    room = int(FREE_MEMORY_SHARE * free) // page
    if cache_memory is None:
        pages = max(min(pages, room), 1)
    if pages > room:
        raise UsageError(
            f"{pages} cache pages of {page_size} tokens take {pages * page} B, and {free} B are free; choose "
            "less cache memory or smaller pages"
        )
    return pages
