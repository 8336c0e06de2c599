"""Residual addition with RMSNorm, and SwiGLU, as one kernel each in a decode step on an NVIDIA GPU."""

import functools
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


def supports(sums: Activations) -> str | None:
    """Returns why ``add_norm`` and ``swiglu`` cannot run on these partial sums, or None if they can."""
    if len(sums.leading) != 2 or sums.leading[1] != 1:
        return f"takes one token of each sequence, not rows of shape {sums.leading}"
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
    x: BFloat16[Array, "b 1 n"], update: Activations, norm_scale: Float[Array, "n"], eps: float
) -> tuple[BFloat16[Array, "b 1 n"], Activations]:
    """Returns ``(x + update, rms_norm(x + update))``, whose norm factor is left to the next kernel.

    Args:
      x: Residual stream.
      update: float32 partial sums of the projection that writes to the stream.
      norm_scale: Learned scale of the norm.
      eps: Epsilon of the norm.
    """
    rows = Rows(x.shape[0], x.shape[2])
    partials = _partials_by_row(update)
    kernel = _add_norm_kernel(launch_shape(rows, update))
    return unapplied_norm(kernel(x[:, 0], partials, norm_scale.astype(jnp.bfloat16)), eps)


def unapplied_norm(outputs: Sequence[jax.Array], eps: float) -> tuple[BFloat16[Array, "b 1 n"], Activations]:
    """Returns what ``add_norm`` does, from the three outputs of its kernel (``AddNormRefs``)."""
    total, values, squares = outputs
    return total[:, None], Activations.of(values[:, None], squares[:, None], eps)


def swiglu(gate_up: Activations) -> Activations:
    """Returns ``silu(gate) * up`` in bfloat16.

    Args:
      gate_up: float32 partial sums ``[partials, B, 1, features]``. The first half of the features is the
        gate.
    """
    partials = _partials_by_row(gate_up)
    rows = Rows(partials.shape[1], gate_up.features // 2)
    (values,) = _swiglu_kernel(launch_shape(rows, gate_up))(partials)
    return Activations.of(values[:, None])


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
    partials = gate_up.reshape((-1,)).partials
    rows = Rows(partials.shape[1], gate_up.features // 2)
    kernel = _swiglu_kernel(launch_shape(rows, gate_up), experts=True, clamp=clamp)
    (values,) = kernel(partials, probabilities.reshape(-1))
    return Activations.of(values).reshape(gate_up.leading)


def _partials_by_row(sums: Activations) -> Float[Array, "partials b features"]:
    """Returns the partial sums without the axis of tokens, of which a decode step has one."""
    return sums.reshape((sums.leading[0],)).partials


def launch_shape(rows: Rows, sums: Activations) -> Shape:
    """Returns the sizes of a launch that adds up these partial sums."""
    count, stored = sums.partials.shape[0], sums.partials.shape[-1]
    return Shape(rows, count, stored // sums.terms, sums.terms)


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
