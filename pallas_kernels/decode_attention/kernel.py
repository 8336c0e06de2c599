"""The two launches of attention in a decode step on an NVIDIA GPU: attention, and the merge of its splits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.activations import Activations
from pallas_kernels.decode_attention.lane_context import THREADS, Refs, Shape
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.program import attention_program
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.rows import Rows

HEAD_DIMS = (64, 128)
MAX_QUERIES_PER_KV = 8
"""Largest number of query heads that share a kv head: 4 of the 32 lanes of a warp hold the scores of one."""

BLOCKS = 128
"""Largest number of CTAs, unless there are more kv heads in the batch: about one for each multiprocessor."""

KERNEL_INPUTS = 8
"""Number of arguments of the first launch without a page table, which comes after them."""

MIN_POSITIONS = 32
"""Minimum number of cache slots for each split of a contiguous cache, but for rounding."""


def supports(*, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype) -> str | None:
    """Returns why the kernel cannot run for these sizes on the target device, or None if it can."""
    if tokens != 1:
        return f"takes one new token of each sequence, not {tokens}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads > MAX_QUERIES_PER_KV * kv_heads:
        return f"takes at most {MAX_QUERIES_PER_KV} query heads for each kv head, not {heads // kv_heads}"
    return device.unsupported_reason()


def decode_attention(
    qkv: Activations,
    cos: Float[Array, "b half"],
    sin: Float[Array, "b half"],
    norm_scales: tuple[Float[Array, "d"], Float[Array, "d"]] | None,
    eps: float,
    keys: BFloat16[Array, "rows s kv_heads d"],
    values: BFloat16[Array, "rows s kv_heads d"],
    lengths: Int[Array, "b"],
    pages: Int[Array, "b pages_per_row"] | None = None,
) -> tuple[Activations, BFloat16[Array, "rows s kv_heads d"], BFloat16[Array, "rows s kv_heads d"]]:
    """Computes head norms, rotation, cache update and attention for one new token of each sequence.

    Args:
      qkv: Query heads, key heads and value heads of the new tokens, ``[B, 1, heads * D]``, before norm and
        rotation; or their partial sums.
      cos, sin: float32 cosine and sine of the ``D / 2`` rotation angles. Channel i of the first half of a
        head is rotated together with channel i of the second half.
      norm_scales: Scales of the query norm and the key norm, or None for models without these norms.
      eps: Epsilon of those norms.
      keys, values: KV cache ``[B, S, kv_heads, D]``, slot = position; or, with ``pages``, the pages of all
        sequences ``[pages, page_size, kv_heads, D]``.
      lengths: Number of tokens in the cache, which is the position of the new token. The new key and value
        are written there unless the cache is full or has no page there; the token always attends to itself.
      pages: Pages of each sequence, in the order of their positions; an entry from the number of pages on is
        no page. Outputs depend bitwise on neither the pages' places, nor the number of entries, nor the other
        sequences. None for a contiguous cache, whose splits depend on its shape.

    Returns:
      ``(outputs, keys, values)``: bfloat16 ``[B, 1, heads * D]``, and the updated cache.
    """
    partials = qkv.reshape((qkv.leading[0],)).partials.astype(jnp.float32)
    kv_heads, head_dim = keys.shape[2:]
    shape = Shape(
        batch=partials.shape[1],
        kv_heads=kv_heads,
        queries_per_kv=qkv.features // (kv_heads * head_dim) - 2,
        head_dim=head_dim,
        eps=None if norm_scales is None else eps,
        num_partials=partials.shape[0],
        stored_features=partials.shape[2],
        **cache_sizes(keys.shape, None if pages is None else pages.shape),
    )
    unscaled = jnp.ones(head_dim, jnp.bfloat16)
    q_scale, k_scale = (scale.astype(jnp.bfloat16) for scale in norm_scales or (unscaled, unscaled))
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    lengths = lengths.astype(jnp.int32)
    attend, merge = _attention_kernel(shape), _merge_kernel(shape)
    table = () if pages is None else (pages.astype(jnp.int32),)
    results = attend(partials, cos, sin, q_scale, k_scale, lengths, keys_ref, values_ref, *table)
    (outputs,) = merge(*results)
    return Activations.of(outputs[:, None]), jax.freeze(keys_ref), jax.freeze(values_ref)


def cache_sizes(cache: tuple[int, ...], table: tuple[int, ...] | None) -> dict[str, Any]:
    """Returns the sizes of ``Shape`` that depend on the cache, by name.

    Args:
      cache: Shape of the keys.
      table: Shape of the page table; None for a contiguous cache.
    """
    if table is None:
        batch, capacity, kv_heads, _ = cache
        splits = max(1, min(BLOCKS // (batch * kv_heads), -(-capacity // MIN_POSITIONS)))
        return {"capacity": capacity, "splits": splits}
    num_pages, page_size, kv_heads, _ = cache
    batch, pages_per_row = table
    # The number of splits determines the order of additions, so it depends on the model alone. The number of
    # splits of a CTA does not change any result.
    splits = max(1, BLOCKS // kv_heads)
    most = max(1, batch * kv_heads * splits // BLOCKS)
    return {
        "capacity": pages_per_row * page_size,
        "splits": splits,
        "splits_per_block": max(n for n in range(1, splits + 1) if splits % n == 0 and n <= most),
        "page_size": page_size,
        "num_pages": num_pages,
    }


@functools.cache
def _attention_kernel(shape: Shape):
    """Builds the kernel. ``lane_context.Refs`` describes its arguments and results."""
    leading = (shape.batch, shape.kv_heads, shape.splits, shape.queries_per_kv)

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        if shape.page_size is not None:  # ``Refs`` has the pages last.
            refs = [*refs[:KERNEL_INPUTS], *refs[KERNEL_INPUTS + 1 :], refs[KERNEL_INPUTS]]
        attention_program(isa, shape, Refs(*refs))

    return lane_kernel(
        "decode_attention_kernel",
        program,
        outputs=[
            jax.ShapeDtypeStruct((*leading, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*leading, 2), jnp.float32),
        ],
        blocks=shape.blocks,
        threads=THREADS,
        shared_bytes=shape.shared_bytes,
    )


@functools.cache
def _merge_kernel(shape: Shape):
    """Builds the kernel of the second launch. ``MergeRefs`` describes its arguments and results."""
    rows = merged_rows(shape)
    return lane_kernel(
        "merge_attention_kernel",
        lambda isa, refs: merge_program(isa, shape, rows, MergeRefs(*refs)),
        outputs=[jax.ShapeDtypeStruct((rows.rows, rows.features), jnp.bfloat16)],
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )


def merged_rows(shape: Shape) -> Rows:
    """Returns how the second launch cuts the output of attention into CTAs."""
    return Rows(shape.batch, shape.kv_heads * shape.queries_per_kv * shape.head_dim)
