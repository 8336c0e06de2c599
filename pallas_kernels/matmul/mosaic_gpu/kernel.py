"""The launch of the product at one level on a GPU: supported arguments and operands."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.matmul.mosaic_gpu.geometry import Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs
from pallas_kernels.matmul.mosaic_gpu.multiplication import UNIT
from pallas_kernels.matmul.mosaic_gpu.program import level_matmul_program
from pallas_kernels.weight import NestedWeight

MAX_ROWS = 512
"""Largest number of activation rows. Every 64 rows read the planes again."""

OFFSET_LIMIT = 2**32
"""Largest number of bytes of planes, because offsets have 32 bits."""


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
    return device.unsupported_reason()


def matmul(x: jax.Array, weight: NestedWeight, level: int) -> jax.Array:
    """Implements ``api.level_matmul`` for bfloat16 x ``[rows, K]``."""
    multiprocessors = device.multiprocessors(device.target_device())
    geometry = geometry_of(len(x), weight, level, multiprocessors)
    operands = activation_operands(x, geometry)
    (partials,) = _level_matmul_kernel(geometry)(*operands, weight.planes, weight.scales)
    gain = 1.0 if weight.level_gains is None else jnp.asarray(weight.level_gains)[level - 1]
    return partials.sum(0)[:, : weight.out_features] * (gain / UNIT)


def geometry_of(rows: int, weight: NestedWeight, level: int, multiprocessors: int) -> Geometry:
    """Returns the sizes of the launch."""
    return Geometry(
        stored_k=weight.planes.shape[1],
        stored_n=weight.scales.shape[1],
        level=level,
        rows=rows,
        multiprocessors=multiprocessors,
    )


def activation_operands(x: jax.Array, g: Geometry) -> tuple[jax.Array, jax.Array]:
    """Returns ``lane_context.Refs.x`` and ``lane_context.Refs.sums`` for bfloat16 x ``[rows, K]``."""
    x = jnp.pad(x, ((0, g.padded_rows - len(x)), (0, g.stored_k - x.shape[1])))
    sums = x.astype(jnp.float32).reshape(g.padded_rows, g.groups, layout.GROUP).sum(-1).T
    terms = [x, x * jnp.bfloat16(1 / 128)][: g.terms]
    return jnp.stack(terms), sums


@functools.cache
def _level_matmul_kernel(geometry: Geometry):
    """Builds the kernel. ``lane_context.Refs`` describes its arguments and results."""
    shape = (geometry.splits, geometry.rows, geometry.stored_n)
    return lane_kernel(
        "level_matmul_kernel",
        lambda isa, refs: level_matmul_program(isa, geometry, Refs(*refs)),
        outputs=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        blocks=geometry.blocks,
        threads=geometry.threads,
        shared_bytes=geometry.shared_bytes,
    )
