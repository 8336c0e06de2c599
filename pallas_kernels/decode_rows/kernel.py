"""Residual addition with RMSNorm, and SwiGLU, as one kernel each in a decode step on an NVIDIA GPU."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.activations import Activations
from pallas_kernels.decode_rows.program import (
    AddNormRefs,
    Clamp,
    Shape,
    SwigluRefs,
    add_norm_program,
    swiglu_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.rows import Rows

MAX_ROWS = 16
"""Largest number of rows if a sequence has several, as in a step that verifies drafts. Rows of prompts are
many, and XLA computes them."""


def supports(sums: Activations) -> str | None:
    """Returns why ``add_norm`` and ``swiglu`` cannot run on these partial sums, or None if they can."""
    if len(sums.leading) != 2:
        return f"takes tokens of sequences, not rows of shape {sums.leading}"
    if sums.leading[1] != 1 and math.prod(sums.leading) > MAX_ROWS:
        return f"takes several tokens of a sequence up to {MAX_ROWS} rows, not rows of shape {sums.leading}"
    return supports_rows(sums)


def supports_rows(sums: Activations) -> str | None:
    """Returns why ``swiglu_experts`` cannot run on these partial sums, or None if it can."""
    if sums.partials.dtype != jnp.float32 or sums.square_partials is not None:
        return f"takes float32 partial sums, not {sums.partials.dtype.name}"
    if sums.dtype != jnp.bfloat16:
        return f"takes sums that are rounded to bfloat16, not {sums.dtype.name}"
    if sums.features % 4:
        return f"takes a multiple of 4 features, not {sums.features}"
    return device.unsupported_reason()


def add_norm(
    x: BFloat16[Array, "b t n"], update: Activations, norm_scale: Float[Array, "n"], eps: float
) -> tuple[BFloat16[Array, "b t n"], Activations]:
    """Returns ``(x + update, rms_norm(x + update))``, whose norm factor is left to the next kernel.

    A row has the same bits among any others.

    Args:
      x: Residual stream.
      update: float32 partial sums of the projection that writes to the stream.
      norm_scale: Learned scale of the norm.
      eps: Epsilon of the norm.
    """
    partials, shape = by_row(update, update.features)
    kernel = _add_norm_kernel(shape)
    return unapplied_norm(kernel(rows_of(x), partials, norm_scale.astype(jnp.bfloat16)), x.shape, eps)


def unapplied_norm(
    outputs: Sequence[jax.Array], size: tuple[int, ...], eps: float
) -> tuple[BFloat16[Array, "b t n"], Activations]:
    """Returns what ``add_norm`` does for x of a size, from the outputs of its kernel (``AddNormRefs``)."""
    total, values, squares = outputs
    squares = squares.reshape(*size[:-1], squares.shape[-1])
    return total.reshape(size), Activations.of(values.reshape(size), squares, eps)


def rows_of(x: Float[Array, "b t n"]) -> Float[Array, "rows n"]:
    """Returns activations with one axis of rows."""
    return x.reshape(-1, x.shape[-1])


def by_row(sums: Activations, features: int) -> tuple[Float[Array, "partials rows stored"], Shape]:
    """Returns partial sums with one axis of rows, and the sizes of a launch that adds them up.

    Args:
      sums: The partial sums.
      features: Number of features that the launch computes.
    """
    partials = sums.reshape((-1,)).partials
    count, rows, stored = partials.shape
    return partials, Shape(Rows(rows, features), count, stored // sums.terms, sums.terms)


def swiglu(gate_up: Activations) -> Activations:
    """Returns ``silu(gate) * up`` in bfloat16. A row has the same bits among any others.

    Args:
      gate_up: float32 partial sums ``[partials, B, t, features]``. The first half of the features is the
        gate.
    """
    partials, shape = by_row(gate_up, gate_up.features // 2)
    (values,) = _swiglu_kernel(shape)(partials)
    return Activations.of(values).reshape(gate_up.leading)


def swiglu_experts(
    gate_up: Activations, probabilities: Float[Array, "*leading"], clamp: Clamp | None = None
) -> Activations:
    """Returns ``probability * silu(gate) * up``, or probability times the clamped SwiGLU, in bfloat16.

    Args:
      gate_up: float32 partial sums ``[partials, *leading, features]``, times the grading factor of the row's
        expert. The first half of the features is the gate.
      probabilities: Probability of each row's expert.
      clamp: Options of the clamped SwiGLU; None for SiLU.
    """
    partials, shape = by_row(gate_up, gate_up.features // 2)
    kernel = _swiglu_kernel(shape, experts=True, clamp=clamp)
    (values,) = kernel(partials, probabilities.reshape(-1))
    return Activations.of(values).reshape(gate_up.leading)


@functools.cache
def _add_norm_kernel(shape: Shape):
    """Builds the kernel. ``AddNormRefs`` describes its arguments and results."""
    rows = shape.rows
    return lane_kernel(
        "add_norm_kernel",
        lambda isa, refs: add_norm_program(isa, shape, AddNormRefs(*refs)),
        outputs=add_norm_outputs(rows),
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )


@functools.cache
def _swiglu_kernel(shape: Shape, *, experts: bool = False, clamp: Clamp | None = None):
    """Builds the kernel. ``SwigluRefs`` describes its arguments and results."""

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        partials, *probabilities, values, shared = refs
        swiglu_program(isa, shape, SwigluRefs(partials, values, shared, *probabilities), clamp)

    return lane_kernel(
        "swiglu_experts_kernel" if experts else "swiglu_kernel",
        program,
        outputs=[_bfloat16_rows(shape.rows)],
        blocks=shape.rows.blocks,
        threads=shape.rows.threads,
        shared_bytes=shape.rows.shared_bytes,
    )


def add_norm_outputs(rows: Rows) -> list[jax.ShapeDtypeStruct]:
    """Returns the outputs of ``add_norm_program``."""
    squares = jax.ShapeDtypeStruct((rows.rows, rows.blocks_per_row), jnp.float32)
    return [_bfloat16_rows(rows), _bfloat16_rows(rows), squares]


def _bfloat16_rows(rows: Rows) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows.rows, rows.features), jnp.bfloat16)
