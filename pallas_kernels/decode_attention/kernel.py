"""The launches of attention in a decode step on an NVIDIA GPU: attention, and the merge of its splits.

Several new tokens of a sequence have a launch before these two, which prepares them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.activations import Activations
from pallas_kernels.decode_attention.lane_context import THREADS, Refs, Shape, SplitConfig
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.new_tokens import PREPARE_THREADS, prepare_blocks, prepare_program
from pallas_kernels.decode_attention.program import attention_program, several_tokens_program
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import WARPGROUP, lane_kernel
from pallas_kernels.lanes.rows import Rows

HEAD_DIMS = (64, 80, 96, 128, 256)

MAX_TOKENS = 16
"""Largest number of new tokens of a sequence: positions of a step."""

MAX_QUERIES_PER_KV = 8
"""Largest number of query heads that share a kv head: 4 of the 32 lanes of a warp hold the scores of one."""

BLOCKS = 128
"""Largest number of CTAs, unless there are more kv heads in the batch: about one for each multiprocessor."""

SPLIT_CONFIG = SplitConfig()
"""Tuning of CTAs that attend to several splits."""

MAX_PARTIAL_BYTES = 1 << 32
"""Most bytes of the weighted values of all splits: programs compute their offsets in 32 bits."""


def supports(*, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype) -> str | None:
    """Returns why the kernel cannot run for these sizes on the target device, or None if it can."""
    if not 1 <= tokens <= MAX_TOKENS:
        return f"takes 1 to {MAX_TOKENS} new tokens of each sequence, not {tokens}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads > MAX_QUERIES_PER_KV * kv_heads:
        return f"takes at most {MAX_QUERIES_PER_KV} query heads for each kv head, not {heads // kv_heads}"
    partial_bytes = 4 * batch * tokens * heads * head_dim * splits(kv_heads)
    if partial_bytes > MAX_PARTIAL_BYTES:
        return f"takes at most {MAX_PARTIAL_BYTES} bytes of partial results, not {partial_bytes}"
    return device.unsupported_reason()


def decode_attention(
    qkv: Activations,
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
    norm_scales: tuple[Float[Array, "d"], Float[Array, "d"]] | None,
    eps: float,
    keys: BFloat16[Array, "rows s kv_heads d"],
    values: BFloat16[Array, "rows s kv_heads d"],
    lengths: Int[Array, "b"],
    pages: Int[Array, "b pages_per_row"] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> tuple[Activations, BFloat16[Array, "rows s kv_heads d"], BFloat16[Array, "rows s kv_heads d"]]:
    """Computes head norms, rotation, cache update and attention for the new tokens of each sequence.

    The output of a token depends bitwise on its position and on the keys and values up to it alone: neither
    on the number of new tokens, nor on the other sequences, nor on the capacity or the pages of the cache.

    Args:
      qkv: Query heads, key heads and value heads of the new tokens, ``[B, T, heads * D]``, before norm and
        rotation; or their partial sums. T is at most ``MAX_TOKENS``.
      cos, sin: float32 cosine and sine of the ``D / 2`` rotation angles. Channel i of the first half of a
        head is rotated together with channel i of the second half.
      norm_scales: Scales of the query norm and the key norm, or None for models without these norms.
      eps: Epsilon of those norms.
      keys, values: KV cache ``[B, S, kv_heads, D]``, slot = position; or, with ``pages``, the pages of all
        sequences ``[pages, page_size, kv_heads, D]``.
      lengths: Number of tokens in the cache, at most S. It is the position of the first new token; the others
        follow it. New keys and values are written to the cache unless it is full or has no page there. A
        token always attends to itself, and to earlier new tokens that were written.
      pages: Pages of each sequence, in the order of their positions; an entry from the number of pages on is
        no page. None for a contiguous cache.
      window: Number of last positions that a token attends to, its own included; None for all. Positions
        before the window of the first new token may have no page.
      scale: Factor of the scores; None for ``D ** -0.5``.
      soft_cap: Limit c of the scaled scores s, which become ``c * tanh(s / c)``; None for no limit.
      sinks: Sink of each query head, a score without a value; None for none.

    Returns:
      ``(outputs, keys, values)``: bfloat16 ``[B, T, heads * D]``, and the updated cache. The splits'
      ``[B, kv_heads, splits, T * heads / kv_heads, D]`` float32 weighted values are temporary memory.
    """
    batch, tokens = qkv.leading
    partials = qkv.reshape((batch * tokens,)).partials.astype(jnp.float32)
    kv_heads, head_dim = keys.shape[2:]
    queries_per_kv = qkv.features // (kv_heads * head_dim) - 2
    shape = Shape(
        batch=batch,
        tokens=tokens,
        kv_heads=kv_heads,
        queries_per_kv=queries_per_kv,
        head_dim=head_dim,
        eps=None if norm_scales is None else eps,
        num_partials=partials.shape[0],
        stored_features=partials.shape[2],
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        **cache_sizes(keys.shape, None if pages is None else pages.shape),
    )
    unscaled = jnp.ones(head_dim, jnp.bfloat16)
    q_scale, k_scale = (scale.astype(jnp.bfloat16) for scale in norm_scales or (unscaled, unscaled))
    cos, sin = (x.reshape(batch * tokens, head_dim // 2) for x in (cos, sin))
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    cache = lengths.astype(jnp.int32), keys_ref, values_ref
    table = () if pages is None else (pages.astype(jnp.int32),)
    heads = (partials, cos, sin, q_scale, k_scale)
    if tokens > 1:
        heads = _prepare_kernel(shape)(*heads, *cache, *table)
    results = _attention_kernel(shape)(*heads, *cache, *table)
    (outputs,) = _merge_kernel(shape)(*results, *(() if sinks is None else (sinks.astype(jnp.float32),)))
    outputs = outputs.reshape(batch, tokens, -1)
    return Activations.of(outputs), jax.freeze(keys_ref), jax.freeze(values_ref)


def splits(kv_heads: int) -> int:
    """Returns the number of splits.

    It determines the order of additions, so it depends on the model alone. The number of splits of a CTA does
    not change any result.
    """
    return max(1, BLOCKS // kv_heads)


def cache_sizes(cache: tuple[int, ...], table: tuple[int, ...] | None) -> dict[str, Any]:
    """Returns the sizes of ``Shape`` that depend on the cache, by name.

    Args:
      cache: Shape of the keys.
      table: Shape of the page table; None for a contiguous cache.
    """
    if table is None:
        batch, capacity, kv_heads, _ = cache
        sizes = {"capacity": capacity}
    else:
        num_pages, page_size, kv_heads, _ = cache
        batch, pages_per_row = table
        sizes = {"capacity": pages_per_row * page_size, "page_size": page_size, "num_pages": num_pages}
    count = splits(kv_heads)
    # One CTA runs on a multiprocessor, so a second wave of CTAs costs a second start.
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    fitting = (n for n in divisors if batch * kv_heads * (count // n) <= BLOCKS)
    sizes |= {"splits": count, "splits_per_block": next(fitting, count)}
    if sizes["splits_per_block"] == 1:
        return sizes
    same_share = sizes["capacity"] >= SPLIT_CONFIG.same_share_capacity
    return sizes | {"shared_limit": SPLIT_CONFIG.shared_limit, "same_share": same_share}


HEAD_INPUTS = ("qkv", "cos", "sin", "q_scale", "k_scale")
PREPARED = ("queries", "new_keys", "new_values")
PARTIAL_RESULTS = ("accumulators", "softmax")


def _cache_inputs(shape: Shape) -> tuple[str, ...]:
    cache = ("lengths", "keys", "values")
    return cache if shape.page_size is None else (*cache, "pages")


@functools.cache
def _prepare_kernel(shape: Shape):
    """Builds the kernel that prepares several new tokens. ``lane_context.Refs`` describes its arrays."""
    names = (*HEAD_INPUTS, *_cache_inputs(shape), *PREPARED, "shared")

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        prepare_program(isa, shape, Refs(**dict(zip(names, refs, strict=True))))

    new = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    queries = (shape.batch, shape.kv_heads, shape.rows, shape.head_dim)
    return lane_kernel(
        "prepare_attention_kernel",
        program,
        outputs=[jax.ShapeDtypeStruct(queries, jnp.bfloat16), new, new],
        blocks=prepare_blocks(shape),
        threads=PREPARE_THREADS,
        shared_bytes=WARPGROUP,
    )


@functools.cache
def _attention_kernel(shape: Shape):
    """Builds the kernel of attention. ``lane_context.Refs`` describes its arrays."""
    heads = HEAD_INPUTS if shape.tokens == 1 else PREPARED
    names = (*heads, *_cache_inputs(shape), *PARTIAL_RESULTS, "shared")
    leading = (shape.batch, shape.kv_heads, shape.splits, shape.rows)
    run = attention_program if shape.tokens == 1 else several_tokens_program

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        run(isa, shape, Refs(**dict(zip(names, refs, strict=True))))

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
    """Builds the kernel of the last launch. ``MergeRefs`` describes its arrays."""
    rows = merged_rows(shape)
    names = (*PARTIAL_RESULTS, *(("sinks",) if shape.has_sinks else ()), "outputs", "shared")

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        merge_program(isa, shape, rows, MergeRefs(**dict(zip(names, refs, strict=True))))

    return lane_kernel(
        "merge_attention_kernel",
        program,
        outputs=[jax.ShapeDtypeStruct((rows.rows, rows.features), jnp.bfloat16)],
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )


def merged_rows(shape: Shape) -> Rows:
    """Returns how the last launch cuts the output of attention into CTAs."""
    return Rows(shape.batch * shape.tokens, shape.kv_heads * shape.queries_per_kv * shape.head_dim)
