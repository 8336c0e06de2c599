"""Dequantizing a whole weight on an NVIDIA GPU: the launch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

from pallas_kernels.dequantization.program import (
    OUTPUTS_AT_ONCE,
    THREADS,
    Refs,
    Shape,
    dequantization_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.weight import NestedWeight


def supports(weight: NestedWeight, dtype) -> str | None:
    """None if the kernel runs for this weight on the device being compiled for, else the reason."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"makes bfloat16, not {jnp.dtype(dtype).name}"
    if weight.out_features % OUTPUTS_AT_ONCE:
        return f"takes a multiple of {OUTPUTS_AT_ONCE} outputs, not {weight.out_features}"
    return device.problem()


def dequantize_to_bfloat16(weight: NestedWeight) -> BFloat16[Array, "k n"]:
    """What ``codes.dequantize(weight, dtype=jnp.bfloat16)`` is, bit for bit but for the sign of zeros."""
    shape = Shape(weight.in_features, weight.out_features, weight.scales.shape[1], weight.num_planes)
    (dense,) = _dequantization(shape)(weight.planes, weight.scales)
    return dense


@functools.cache
def _dequantization(shape: Shape):
    """The kernel: arguments and results as in ``program.Refs``."""
    return lane_kernel(
        "dequantization_kernel",
        lambda isa, refs: dequantization_program(isa, shape, Refs(*refs)),
        outputs=[jax.ShapeDtypeStruct((shape.in_features, shape.out_features), jnp.bfloat16)],
        blocks=shape.blocks,
        threads=THREADS,
        shared_bytes=16,  # None is used; the launcher asks for some.
    )
