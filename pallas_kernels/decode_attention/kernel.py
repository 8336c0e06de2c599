"""Attention of a decode step on an NVIDIA GPU: launch of the lane program, merge of its partial results."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.activations import Activations, PartialSums
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.place import THREADS, WARPS, Refs, Shape
from pallas_kernels.decode_attention.program import attention_program
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.rows import Rows

HEAD_DIMS = (64, 128)
MAX_GROUP = WARPS - 2
"""Query heads to a kv head: each is prepared by a warp, as are the new key and the new value."""

BLOCKS = 128
"""CTAs wanted: about one on every multiprocessor."""

MIN_POSITIONS = 32
"""Cached positions worth a split of their own."""


def supports(*, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype) -> str | None:
    """None if the kernel runs for these sizes on the device being compiled for, else the reason."""
    if tokens != 1:
        return f"takes one new token of each sequence, not {tokens}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads > MAX_GROUP * kv_heads:
        return f"takes at most {MAX_GROUP} query heads to a kv head, not {heads // kv_heads}"
    return device.problem()


def decode_attention(
    qkv: PartialSums,
    cos: Float[Array, "b half"],
    sin: Float[Array, "b half"],
    scales: tuple[BFloat16[Array, "d"], BFloat16[Array, "d"]] | None,
    eps: float,
    keys: BFloat16[Array, "b s kv_heads d"],
    values: BFloat16[Array, "b s kv_heads d"],
    lengths: Int[Array, "b"],
) -> tuple[Activations, BFloat16[Array, "b s kv_heads d"], BFloat16[Array, "b s kv_heads d"]]:
    """Norm, rotation, cache update and attention of one new token per sequence.

    Args:
      qkv: the new tokens' query heads, key heads and value heads, before norm and rotation.
      cos, sin: of the rotation angles, ``D / 2`` of them; the first half of a head rotates with the second.
      scales: of the query and the key norm, or None for models without.
      eps: of those norms.
      keys, values: the cache, slot = position.
      lengths: positions in the cache; the new token's slot. Its key and value are written there unless the
        cache is full; the token attends to itself in any case.

    Returns:
      ``(outputs, keys, values)``: bfloat16 ``[B, heads * D]``, and the updated cache.
    """
    batch, capacity, kv_heads, head_dim = keys.shape
    shape = Shape(
        batch=batch,
        kv_heads=kv_heads,
        group=qkv.features // (kv_heads * head_dim) - 2,
        head_dim=head_dim,
        capacity=capacity,
        splits=max(1, min(BLOCKS // (batch * kv_heads), -(-capacity // MIN_POSITIONS))),
        eps=None if scales is None else eps,
        parts=qkv.parts.shape[0],
        stored_columns=qkv.parts.shape[2],
    )
    unscaled = jnp.ones(head_dim, jnp.bfloat16)
    q_scale, k_scale = (scale.astype(jnp.bfloat16) for scale in scales or (unscaled, unscaled))
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    lengths = lengths.astype(jnp.int32)
    mixed, tops = _attention(shape)(qkv.parts, cos, sin, q_scale, k_scale, lengths, keys_ref, values_ref)
    (outputs,) = _merge(shape)(mixed, tops)
    return Activations(outputs), jax.freeze(keys_ref), jax.freeze(values_ref)


@functools.cache
def _attention(shape: Shape):
    """The kernel: arguments and results as in ``place.Refs``, without the shared memory."""
    part = (shape.batch, shape.kv_heads, shape.splits, shape.group)
    return lane_kernel(
        "decode_attention_kernel",
        lambda isa, refs: attention_program(isa, shape, Refs(*refs)),
        outputs=[
            jax.ShapeDtypeStruct((*part, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*part, 2), jnp.float32),
        ],
        blocks=shape.blocks,
        threads=THREADS,
        shared_bytes=shape.shared_bytes,
    )


@functools.cache
def _merge(shape: Shape):
    """Likewise, ``merging.MergeRefs``."""
    rows = merged_rows(shape)
    return lane_kernel(
        "merge_attention_kernel",
        lambda isa, refs: merge_program(isa, shape, rows, MergeRefs(*refs)),
        outputs=[jax.ShapeDtypeStruct((rows.rows, rows.columns), jnp.bfloat16)],
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )


def merged_rows(shape: Shape) -> Rows:
    """The attention's outputs."""
    return Rows(shape.batch, shape.kv_heads * shape.group * shape.head_dim)
