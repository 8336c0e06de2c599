"""The launch of the product at one level on a GPU: supported arguments and operands."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activations
from pallas_kernels.codes import CODE_STEPS
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.matmul.mosaic_gpu import geometry
from pallas_kernels.matmul.mosaic_gpu.coding import (
    CODE_UNIT,
    CODING_THREADS,
    CodingRefs,
    coding_blocks,
    coding_program,
)
from pallas_kernels.matmul.mosaic_gpu.geometry import GROUP_MATRICES, OCTET, THREADS, Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs
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
    g = geometry_of(len(x), weight, level)
    operands = [x] if g.codes_activations else _coding_kernel(g)(x)
    (partials,) = _level_matmul_kernel(g)(*operands, weight.planes, weight.scales)
    gain = 1.0 if weight.level_gains is None else jnp.asarray(weight.level_gains)[level - 1]
    return Activations.sums(partials, weight.out_features).array * (gain * (CODE_UNIT / CODE_STEPS))


def geometry_of(rows: int, weight: NestedWeight, level: int) -> Geometry:
    """Returns the sizes of the launches on the target device."""
    target = device.target_device()
    return Geometry(
        in_features=weight.in_features,
        stored_k=weight.planes.shape[1],
        stored_n=weight.scales.shape[1],
        level=level,
        rows=rows,
        multiprocessors=device.multiprocessors(target),
        shared_limit=device.shared_memory(target),
        warpgroups=geometry.WARPGROUP_ROWS is not None
        and rows >= geometry.WARPGROUP_ROWS
        and getattr(target, "compute_capability", None) == "9.0",
    )


@functools.cache
def _coding_kernel(g: Geometry):
    """Builds the kernel that codes the activations. ``coding.CodingRefs`` describes its arrays."""
    octets = g.rows_per_cta // OCTET
    return lane_kernel(
        "level_matmul_coding_kernel",
        lambda isa, refs: coding_program(isa, g, CodingRefs(*refs)),
        outputs=[
            jax.ShapeDtypeStruct((g.row_batches, g.groups, GROUP_MATRICES, octets, 32, 4), jnp.uint32),
            jax.ShapeDtypeStruct((g.row_batches, g.groups, 2, g.rows_per_cta, 4), jnp.uint32),
        ],
        blocks=coding_blocks(g),
        threads=CODING_THREADS,
        shared_bytes=16,  # Not used, but the launch needs a shared array that is not empty.
    )


@functools.cache
def _level_matmul_kernel(g: Geometry):
    """Builds the kernel. ``lane_context.Refs`` describes its arrays."""
    return lane_kernel(
        f"level_matmul_{g.stored_k}x{g.stored_n}_kernel",
        lambda isa, refs: level_matmul_program(isa, g, Refs.of(g, *refs)),
        outputs=[jax.ShapeDtypeStruct((g.splits, g.rows, g.stored_n), jnp.float32)],
        blocks=g.blocks,
        threads=THREADS,
        shared_bytes=g.shared_bytes,
    )
