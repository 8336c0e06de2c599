"""The launch that dequantizes a whole weight, or those of all experts, on an NVIDIA GPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16

from pallas_kernels.dequantization.program import (
    RUN_OUTPUTS,
    THREADS,
    Refs,
    Shape,
    dequantization_program,
)
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.weight import NestedWeight


def supports(weight: NestedWeight | NestedExperts, dtype) -> str | None:
    """Returns why the kernel cannot run for this weight on the target device, or None if it can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"makes bfloat16, not {jnp.dtype(dtype).name}"
    if weight.out_features % RUN_OUTPUTS:
        return f"takes a multiple of {RUN_OUTPUTS} outputs, not {weight.out_features}"
    return device.unsupported_reason()


def dequantize_to_bfloat16(
    weight: NestedWeight | NestedExperts, level: int | None = None
) -> BFloat16[Array, "*experts k n"]:
    """Dequantizes a weight at one level without the gain of the level.

    Returns ``[in_features, out_features]``, of experts ``[experts, in_features, out_features]``. Reads the
    planes of the level only. Equals ``codes.dequantize(weight, level, jnp.bfloat16)`` of a weight
    whose level gains are 1 bit for bit, except for the sign of zeros.

    Args:
      weight: The nested weight, or those of all experts.
      level: Level of all input channels, 1 to ``weight.num_planes``. The default is the highest, whose gain
        is 1.
    """
    planes = weight.num_planes if level is None else level
    experts = weight.num_experts if isinstance(weight, NestedExperts) else None
    sizes = weight.in_features, weight.out_features, weight.scales.shape[-1]
    shape = Shape(*sizes, planes, weight.num_planes, experts)
    (dense,) = _dequantization_kernel(shape)(weight.planes, weight.scales)
    return dense


@functools.cache
def _dequantization_kernel(shape: Shape):
    """Builds the kernel. ``program.Refs`` describes its arguments and results."""
    return lane_kernel(
        "dequantization_kernel",
        lambda isa, refs: dequantization_program(isa, shape, Refs(*refs)),
        outputs=[jax.ShapeDtypeStruct(shape.dense, jnp.bfloat16)],
        blocks=shape.blocks,
        threads=THREADS,
        shared_bytes=16,  # Not used, but the launch needs a shared array that is not empty.
    )
