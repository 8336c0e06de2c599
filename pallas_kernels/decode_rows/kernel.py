"""Residual addition with RMSNorm, and SwiGLU, as one kernel each in a decode step on an NVIDIA GPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.activations import Activations
from pallas_kernels.decode_rows.program import (
    AddNormRefs,
    Shape,
    SwigluRefs,
    add_norm_program,
    swiglu_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.rows import Rows


def supports(sums: Activations) -> str | None:
    """Returns why ``add_norm`` and ``swiglu`` cannot take these partial sums, or None if they can."""
    if len(sums.leading) != 2 or sums.leading[1] != 1:
        return f"takes one token of each sequence, not rows of shape {sums.leading}"
    if sums.partials.dtype != jnp.float32 or sums.square_partials is not None:
        return f"takes float32 partial sums, not {sums.partials.dtype.name}"
    if sums.dtype != jnp.bfloat16:
        return f"takes sums that are rounded to bfloat16, not {sums.dtype.name}"
    if sums.features % 4:
        return f"takes a multiple of 4 features, not {sums.features}"
    return device.unsupported_reason()


def add_norm(
    x: BFloat16[Array, "b 1 n"], update: Activations, norm_scale: Float[Array, "n"], eps: float
) -> tuple[BFloat16[Array, "b 1 n"], Activations]:
    """Returns ``(x + update, rms_norm(x + update))``; the norm's factor is left to the next kernel.

    Args:
      x: Residual stream.
      update: float32 partial sums of the product that is added to it.
      norm_scale: Learned scale of the norm.
      eps: Epsilon of the norm.
    """
    rows = Rows(x.shape[0], x.shape[2])
    partials = _rows(update)
    run = _add_norm(Shape(rows, partials.shape[0], partials.shape[2]))
    total, values, squares = run(x[:, 0], partials, norm_scale.astype(jnp.bfloat16))
    return total[:, None], Activations.of(values[:, None], squares[:, None], eps)


def swiglu(gate_up: Activations) -> Activations:
    """Returns ``silu(gate) * up`` in bfloat16.

    Args:
      gate_up: float32 partial sums ``[partials, B, 1, features]``. The first half of the features is the
        gate.
    """
    partials = _rows(gate_up)
    rows = Rows(partials.shape[1], gate_up.features // 2)
    (values,) = _swiglu(Shape(rows, partials.shape[0], partials.shape[2]))(partials)
    return Activations.of(values[:, None])


def _rows(sums: Activations) -> Float[Array, "partials b features"]:
    return sums.reshape((sums.leading[0],)).partials


@functools.cache
def _add_norm(shape: Shape):
    rows = shape.rows
    return lane_kernel(
        "add_norm_kernel",
        lambda isa, refs: add_norm_program(isa, shape, AddNormRefs(*refs)),
        outputs=[
            _values(rows),
            _values(rows),
            jax.ShapeDtypeStruct((rows.rows, rows.blocks_per_row), jnp.float32),
        ],
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )


@functools.cache
def _swiglu(shape: Shape):
    return lane_kernel(
        "swiglu_kernel",
        lambda isa, refs: swiglu_program(isa, shape, SwigluRefs(*refs)),
        outputs=[_values(shape.rows)],
        blocks=shape.rows.blocks,
        threads=shape.rows.threads,
        shared_bytes=shape.rows.shared_bytes,
    )


def _values(rows: Rows) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows.rows, rows.features), jnp.bfloat16)
