"""The two launches of attention in a decode step on an NVIDIA GPU: attention, and the merge of its splits."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.activations import Activations
from pallas_kernels.decode_attention.lane_context import THREADS, WARPS, Refs, Shape
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.program import attention_program
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.rows import Rows

HEAD_DIMS = (64, 128)
MAX_QUERIES_PER_KV = WARPS - 2
"""Largest number of query heads that share a kv head, because each warp prepares one query head, the new key
or the new value."""

BLOCKS = 128
"""Largest number of CTAs, unless there are more kv heads in the batch: about one for each multiprocessor."""

MIN_POSITIONS = 32
"""Minimum number of cache slots for each split, but for rounding."""


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
    keys: BFloat16[Array, "b s kv_heads d"],
    values: BFloat16[Array, "b s kv_heads d"],
    lengths: Int[Array, "b"],
) -> tuple[Activations, BFloat16[Array, "b s kv_heads d"], BFloat16[Array, "b s kv_heads d"]]:
    """Computes head norms, rotation, cache update and attention for one new token of each sequence.

    Args:
      qkv: Query heads, key heads and value heads of the new tokens, ``[B, 1, heads * D]``, before norm and
        rotation; or their partial sums.
      cos, sin: float32 cosine and sine of the ``D / 2`` rotation angles. Channel i of the first half of a
        head is rotated together with channel i of the second half.
      norm_scales: Scales of the query norm and the key norm, or None for models without these norms.
      eps: Epsilon of those norms.
      keys, values: KV cache; slot = position.
      lengths: Number of tokens in the cache, which is the slot of the new token. The new key and value are
        written there unless the cache is full; the token always attends to itself.

    Returns:
      ``(outputs, keys, values)``: bfloat16 ``[B, 1, heads * D]``, and the updated cache.
    """
    partials = qkv.reshape((qkv.leading[0],)).partials.astype(jnp.float32)
    batch, capacity, kv_heads, head_dim = keys.shape
    shape = Shape(
        batch=batch,
        kv_heads=kv_heads,
        queries_per_kv=qkv.features // (kv_heads * head_dim) - 2,
        head_dim=head_dim,
        capacity=capacity,
        splits=max(1, min(BLOCKS // (batch * kv_heads), -(-capacity // MIN_POSITIONS))),
        eps=None if norm_scales is None else eps,
        num_partials=partials.shape[0],
        stored_features=partials.shape[2],
    )
    unscaled = jnp.ones(head_dim, jnp.bfloat16)
    q_scale, k_scale = (scale.astype(jnp.bfloat16) for scale in norm_scales or (unscaled, unscaled))
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    lengths = lengths.astype(jnp.int32)
    attend, merge = _attention_kernel(shape), _merge_kernel(shape)
    results = attend(partials, cos, sin, q_scale, k_scale, lengths, keys_ref, values_ref)
    (outputs,) = merge(*results)
    return Activations.of(outputs[:, None]), jax.freeze(keys_ref), jax.freeze(values_ref)


@functools.cache
def _attention_kernel(shape: Shape):
    """Builds the kernel. ``lane_context.Refs`` describes its arguments and results."""
    leading = (shape.batch, shape.kv_heads, shape.splits, shape.queries_per_kv)
    return lane_kernel(
        "decode_attention_kernel",
        lambda isa, refs: attention_program(isa, shape, Refs(*refs)),
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
