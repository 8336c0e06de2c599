"""Attention of a decode step on an NVIDIA GPU: launch of the lane program, merge of its partial results."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.decode_attention.program import THREADS, Refs, Shape, attention_program
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec_kernel

HEAD_DIMS = (64, 128)
MAX_GROUP = 5
"""Query heads to a kv head: each takes 32 registers of every lane."""

BLOCKS = 128
"""CTAs wanted: about one on every multiprocessor."""

MIN_POSITIONS = 32
"""Cached positions worth a split of their own."""


def supports(*, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype) -> str | None:
    """None if the kernel runs for these sizes on the device being compiled for, else the reason."""
    if jax.__version_info__ < matvec_kernel.OLDEST_JAX:
        return f"needs jax >= {'.'.join(map(str, matvec_kernel.OLDEST_JAX))}, this is {jax.__version__}"
    if tokens != 1:
        return f"takes one new token of each sequence, not {tokens}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"takes heads of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if heads > MAX_GROUP * kv_heads:
        return f"takes at most {MAX_GROUP} query heads to a kv head, not {heads // kv_heads}"
    return matvec_kernel._device_problem(matvec_kernel._target_device())


def decode_attention(
    qkv: BFloat16[Array, "b row"],
    cos: Float[Array, "b half"],
    sin: Float[Array, "b half"],
    scales: tuple[BFloat16[Array, "d"], BFloat16[Array, "d"]] | None,
    eps: float,
    keys: BFloat16[Array, "b s kv_heads d"],
    values: BFloat16[Array, "b s kv_heads d"],
    lengths: Int[Array, "b"],
) -> tuple[Float[Array, "b heads_d"], BFloat16[Array, "b s kv_heads d"], BFloat16[Array, "b s kv_heads d"]]:
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
      ``(outputs, keys, values)``: float32 ``[B, heads * D]``, and the updated cache.
    """
    batch, capacity, kv_heads, head_dim = keys.shape
    splits = max(1, min(BLOCKS // (batch * kv_heads), -(-capacity // MIN_POSITIONS)))
    shape = Shape(
        batch=batch,
        kv_heads=kv_heads,
        group=qkv.shape[1] // (kv_heads * head_dim) - 2,
        head_dim=head_dim,
        capacity=capacity,
        splits=splits,
        eps=None if scales is None else eps,
    )
    unscaled = jnp.ones(head_dim, jnp.bfloat16)
    q_scale, k_scale = scales or (unscaled, unscaled)
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    parts = launch(shape)(qkv, cos, sin, q_scale, k_scale, lengths.astype(jnp.int32), keys_ref, values_ref)
    return merge(*parts), jax.freeze(keys_ref), jax.freeze(values_ref)


def merge(
    mixed: Float[Array, "b h s g d"], maxima: Float[Array, "b h s g d"], sums: Float[Array, "b h s g d"]
) -> Float[Array, "b n"]:
    """The softmax over all splits. Written as single operations, which fuse into one kernel."""
    splits = range(mixed.shape[2])
    top = functools.reduce(jnp.maximum, [maxima[:, :, s] for s in splits])
    weights = [jnp.exp2(maxima[:, :, s] - top) for s in splits]
    total = sum(w * sums[:, :, s] for s, w in zip(splits, weights, strict=True))
    outputs = sum(w * mixed[:, :, s] for s, w in zip(splits, weights, strict=True))
    return (outputs / total).reshape(mixed.shape[0], -1)


@functools.cache
def launch(shape: Shape):
    """The kernel: arguments and results as in ``program.Refs``, without the shared memory."""
    from jax.experimental.mosaic import gpu as mosaic_gpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.decode_attention.instructions import ptx_instructions

    def decode_attention_kernel(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lanes(context, *refs):
            del context
            attention_program(ptx_instructions(), shape, Refs(*refs))

        lanes(*refs)

    part = (shape.batch, shape.kv_heads, shape.splits, shape.group, shape.head_dim)
    return plgpu.kernel(
        decode_attention_kernel,
        out_type=[jax.ShapeDtypeStruct(part, jnp.float32)] * 3,
        scratch_types=[plgpu.SMEM((shape.shared_bytes,), jnp.int8)],
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mosaic_gpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )
