"""The launch of the product at one level on a GPU: supported arguments, and operands."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activations
from pallas_kernels.codes import CODE_STEPS
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.layout import MAX_PLANES
from pallas_kernels.matmul.mosaic_gpu import geometry
from pallas_kernels.matmul.mosaic_gpu.geometry import THREADS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs
from pallas_kernels.matmul.mosaic_gpu.program import level_matmul_program
from pallas_kernels.weight import NestedWeight

MAX_ROWS = 512
"""Largest number of activation rows. Every 64 or, from 65 rows on, 128 rows read the planes again."""

OFFSET_LIMIT = 2**32
"""Largest number of bytes of planes. It leaves offsets of scales and partial sums below 32 bits."""


def supports(x: jax.Array | jax.ShapeDtypeStruct, weight: NestedWeight, level: int) -> str | None:
    """Returns why the kernel cannot run for these arguments on the target device, or None if it can."""
    del level
    rows, dtype = x.shape[0], jnp.dtype(x.dtype)
    if not 1 <= rows <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, not {rows}"
    if dtype != jnp.bfloat16:
        return f"takes bfloat16 activations, not {dtype.name}"
    plane_bytes = 4 * weight.planes.size
    if plane_bytes > OFFSET_LIMIT:
        return f"addresses at most {OFFSET_LIMIT} bytes of planes, the weight has {plane_bytes}"
    return device.unsupported_reason() or device.no_warpgroup_products_reason()


def matmul(x: jax.Array, weight: NestedWeight, level: int, rounded: bool | None = None) -> jax.Array:
    """Implements ``api.level_matmul`` for bfloat16 x ``[rows, K]``.

    For more than 64 rows weights are rounded to bfloat16, as XLA's dequantized copies are, and 128 rows share
    one read of the planes. ``rounded`` decides otherwise.
    """
    g = geometry_of(len(x), weight, level, rounded)
    x = jnp.pad(x, ((0, 0), (0, g.stored_k - x.shape[1])))
    (partials,) = _level_matmul_kernel(g)(x, weight.planes, weight.scales)
    gain = 1.0 if weight.level_gains is None else jnp.asarray(weight.level_gains)[level - 1]
    return Activations.sums(partials, weight.out_features).array * (gain * unit(level))


def unit(level: int) -> float:
    """Returns the unit of the kernel's sums: half of the last digit that it reads, in units of the scales."""
    return 4 ** (MAX_PLANES - level) / 2 / CODE_STEPS


def geometry_of(rows: int, weight: NestedWeight, level: int, rounded: bool | None) -> Geometry:
    """Returns the sizes of the launch on the target device."""
    target = device.target_device()
    return Geometry(
        stored_k=weight.planes.shape[1],
        stored_n=weight.scales.shape[1],
        level=level,
        rows=rows,
        multiprocessors=device.multiprocessors(target),
        shared_limit=device.shared_memory(target),
        rounded=rows > geometry.MAX_EXACT_ROWS if rounded is None else rounded,
    )


@functools.cache
def _level_matmul_kernel(g: Geometry):
    """Builds the kernel. ``lane_context.Refs`` describes its arrays."""
    return lane_kernel(
        f"level_matmul_{g.stored_k}x{g.stored_n}_kernel",
        lambda isa, refs: level_matmul_program(isa, g, Refs(*refs)),
        outputs=[jax.ShapeDtypeStruct((g.splits, g.rows, g.stored_n), jnp.float32)],
        blocks=g.blocks,
        threads=THREADS,
        shared_bytes=g.shared_bytes,
    )
