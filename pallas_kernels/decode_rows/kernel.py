"""Residual and norm, and SwiGLU, of a decode step on an NVIDIA GPU: one launch each between two products."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

from pallas_kernels.activations import Activations, PartialSums
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


def supports(sums: PartialSums, dtype) -> str | None:
    """None if what follows a product may be these kernels, its rows being of ``dtype``, else the reason."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if sums.features % 4:
        return f"takes a multiple of 4 columns, not {sums.features}"
    return device.problem()


def add_norm(
    x: BFloat16[Array, "rows n"], update: PartialSums, gain: BFloat16[Array, "n"], eps: float
) -> tuple[BFloat16[Array, "rows n"], Activations]:
    """``(x + update, its RMSNorm)``, the latter still to be divided by its root mean square.

    Args:
      x: the residual stream.
      update: what the last product adds to it.
      gain: of the norm.
      eps: of the norm.
    """
    rows = Rows(*x.shape)
    total, values, squares = _add_norm(_shape(rows, update))(x, update.parts, gain.astype(jnp.bfloat16))
    return total, Activations(values, squares, eps)


def swiglu(gate_up: PartialSums) -> Activations:
    """``silu(gate) * up`` in bfloat16, the gate being the first half of the columns."""
    rows = Rows(gate_up.parts.shape[1], gate_up.features // 2)
    (values,) = _swiglu(_shape(rows, gate_up))(gate_up.parts)
    return Activations(values)


def _shape(rows: Rows, sums: PartialSums) -> Shape:
    return Shape(rows, sums.parts.shape[0], sums.parts.shape[2])


@functools.cache
def _add_norm(shape: Shape):
    rows = shape.rows
    return lane_kernel(
        "add_norm_kernel",
        lambda isa, refs: add_norm_program(isa, shape, AddNormRefs(*refs)),
        outputs=[_values(rows), _values(rows), jax.ShapeDtypeStruct((rows.rows, rows.parts), jnp.float32)],
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
    return jax.ShapeDtypeStruct((rows.rows, rows.columns), jnp.bfloat16)
