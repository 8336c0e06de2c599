"""Products of rows with the unquantized kernels of their experts."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, UInt16

from pallas_kernels.experts import grouped
from pallas_kernels.experts.batches import batch_rows, map_batches
from pallas_kernels.experts.blocks import block_rows, map_blocks

MOST_SUMMED_ROWS = 128
"""Most rows whose products with unquantized experts are computed row by row, except on a CPU: those of a
decode step. Each row then reads the weights of its expert. In a loop over experts, a GPU would need several
launches for each expert and wait after each."""

Kernels = Float[Array, "e k n"] | UInt16[Array, "e k n"]
"""Kernels of experts ``[experts, in_features, out_features]``. uint16 numbers are the bits of bfloat16."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, "rows k"], kernel: Kernels, experts: Int[Array, "rows"], num_experts: int
) -> Float[Array, "rows n"]:
    """Returns ``x[r] @ kernel[experts[r]]``, float32, differentiable in x.

    Args:
      x: Rows.
      kernel: Kernels of all experts, or of a group.
      experts: Expert of each row, an index into ``kernel``; rows of expert ``len(kernel)`` get zeros.
      num_experts: Number of all experts.
    """
    if len(experts) > MOST_SUMMED_ROWS or num_experts > len(kernel):
        return _product(x, kernel, experts, num_experts)
    in_blocks = partial(_in_blocks, num_experts=num_experts)
    return jax.lax.platform_dependent(x, kernel, experts, cpu=in_blocks, default=_row_by_row)


def all_at_once(
    x: Float[Array, "rows k"],
    kernel: Float[Array, "e k n"],
    experts: Int[Array, "rows"],
    num_experts: int,
    transposed: bool = False,
) -> Float[Array, "rows n"]:
    """Returns what ``grouped_matmul`` does, in one product of all kernels; for GPUs.

    That is one launch on Hopper, and else XLA's products of batches with equally many rows of each expert.

    Args:
      x, kernel, experts, num_experts: See ``grouped_matmul``; x and kernel have the same dtype.
      transposed: Whether the kernels are ``[experts, n, k]``.
    """
    if grouped.supports(x, kernel, transposed) is None:
        return grouped.grouped_product(x, kernel, experts, num_experts, transposed)
    axes = "eck,enk->ecn" if transposed else "eck,ekn->ecn"
    return map_batches(
        lambda batch: jnp.einsum(axes, batch, kernel, preferred_element_type=jnp.float32),
        x,
        experts,
        num_experts=len(kernel),
        capacity=batch_rows(len(x), num_experts),
    )


def _product(
    x: Float[Array, "rows k"],
    kernel: Kernels,
    experts: Int[Array, "rows"],
    num_experts: int,
    transposed: bool = False,
) -> Float[Array, "rows n"]:
    """Multiplies many rows: in blocks on a CPU, all at once on other devices."""
    in_blocks = partial(_in_blocks, num_experts=num_experts, transposed=transposed)
    if _dtype(kernel) != x.dtype:  # All at once would need a cast of all kernels.
        return in_blocks(x, kernel, experts)

    def at_once(x: jax.Array, kernel: jax.Array, experts: jax.Array) -> jax.Array:
        return all_at_once(x, _as_stored(kernel), experts, num_experts, transposed)

    return jax.lax.platform_dependent(x, kernel, experts, cpu=in_blocks, default=at_once)


def _in_blocks(
    x: Float[Array, "rows k"],
    kernel: Kernels,
    experts: Int[Array, "rows"],
    num_experts: int,
    transposed: bool = False,
) -> Float[Array, "rows n"]:
    """Multiplies blocks of rows that share an expert."""

    def block(expert, rows):
        one = _kernel_of(kernel, expert, x.dtype)
        return jnp.matmul(rows, one.T if transposed else one, preferred_element_type=jnp.float32)

    size, outputs = block_rows(len(x), num_experts), kernel.shape[1 if transposed else 2]
    return map_blocks(block, x, experts, num_experts=len(kernel), outputs=outputs, size=size)


def _row_by_row(
    x: Float[Array, "rows k"], kernel: Kernels, experts: Int[Array, "rows"]
) -> Float[Array, "rows n"]:
    """Multiplies and adds up in one kernel of XLA, which reads the experts in place, without a loop."""
    # Without the constraint XLA (jax 0.11.2 and 0.12) would transpose what it gathers, and thus read 32 bytes
    # of memory for each number.
    of_rows = with_layout_constraint(_kernel_of(kernel, experts, x.dtype), Layout((0, 1, 2)))
    of_rows = of_rows.astype(jnp.float32)
    return jnp.sum(x[:, :, None].astype(jnp.float32) * of_rows, axis=1)


def _kernel_of(kernel: Kernels, expert: Int[Array, "*rows"], dtype) -> Float[Array, "*rows k n"]:
    """Returns the kernel of one expert, or those of several, in ``dtype``.

    XLA (jax 0.10.2) slices bfloat16 on a CPU in float32, and would convert the kernels of all experts ahead
    of the loop. Slicing their bits as integers copies them there instead, which takes half the memory. Stored
    as these bits, kernels are not copied.
    """
    if kernel.dtype == jnp.bfloat16:
        kernel = jax.lax.bitcast_convert_type(kernel, jnp.uint16)
    return _as_stored(kernel[expert]).astype(dtype)


def _dtype(kernel: Kernels) -> jnp.dtype:
    """Returns the dtype of the numbers of kernels."""
    return jnp.dtype(jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel.dtype


def _as_stored(kernel: Kernels) -> jax.Array:
    """Returns kernels as numbers of the dtype in which they are stored."""
    return jax.lax.bitcast_convert_type(kernel, jnp.bfloat16) if kernel.dtype == jnp.uint16 else kernel


def _forward(x, kernel, experts, num_experts):
    # The residuals must be a pytree, so an empty array carries the dtype.
    return grouped_matmul(x, kernel, experts, num_experts), (kernel, experts, jnp.zeros(0, x.dtype))


def _backward(num_experts, residuals, gradient):
    kernel, experts, like = residuals
    back = _product(gradient.astype(like.dtype), kernel, experts, num_experts, transposed=True)
    return back.astype(like.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)

jitted_matmul = jax.jit(grouped_matmul, static_argnums=3, inline=True)
"""``grouped_matmul``. Outside of a traced function, its loop would be compiled again at every call."""
