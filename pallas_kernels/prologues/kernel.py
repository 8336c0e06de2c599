"""The launch of a graded product whose prologue computes its activation row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activations
from pallas_kernels.grading import GradingParts
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec
from pallas_kernels.matvec.mosaic_gpu.geometry import Config
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.prologues.deferred import Deferred
from pallas_kernels.prologues.program import COUNTING_CTAS, PrologueGeometry, prologue_program
from pallas_kernels.weight import NestedWeight
from pallas_kernels.x64 import without_x64


def supports(x: Deferred, weight: NestedWeight) -> str | None:
    """Returns why ``partial_sums`` cannot run for these arguments on the target device, or None if it can."""
    if x.features != weight.in_features:
        return f"takes {weight.in_features} features, not {x.features}"
    return matvec.supports(jax.ShapeDtypeStruct((1, x.features), jnp.bfloat16), weight)


@without_x64
def partial_sums(
    x: Deferred,
    weight: NestedWeight,
    thresholds: Float[Array, "1 1 p"],
    *,
    config: Config | None = None,
) -> tuple[Activations, GradingParts]:
    """Computes ``matvec.graded_partial_sums`` of a row that is not computed yet, in one launch.

    The results have the same bits as those of ``graded_partial_sums(x.finished(), weight, thresholds)``.

    Args:
      x: The row.
      weight: The nested weight.
      thresholds: Ascending thresholds of the row.
      config: Tuning of the launch. The default is that of ``graded_partial_sums``.

    Returns:
      float32 partial sums ``[1, 1, out_features]``, and the statistics of the row, not yet added up.
    """
    geometry = geometry_of(x, weight, config)
    gains = jnp.ones(weight.num_planes) if weight.level_gains is None else weight.level_gains
    floats = [a.astype(jnp.float32) for a in (thresholds.reshape(1, -1), gains)]
    partials, parts = _kernel(geometry, len(x.arrays))(*x.arrays, *floats, weight.planes, weight.scales)
    y = Activations.sums(partials, weight.out_features).reshape(x.leading)
    return y, GradingParts(parts.reshape(*x.leading, COUNTING_CTAS, 2), weight.in_features)


def geometry_of(x: Deferred, weight: NestedWeight, config: Config | None = None) -> PrologueGeometry:
    """Returns the sizes of the launch that ``partial_sums`` makes for these arguments."""
    alone = matvec.geometry_of(x.abstract(), weight, config)
    return PrologueGeometry(**vars(alone), source=x.source)


ARRAYS = ("thresholds", "level_gains", "planes", "scales", "partials", "stats", "shared")
"""Fields of ``Refs`` after the arrays of the row, in the order of the kernel's arguments and results."""


def run_program(isa: Instructions, geometry: PrologueGeometry, sources: int, refs: Sequence[Any]) -> None:
    """Runs the lane program. The refs are ``sources`` arrays of the row, then ``ARRAYS``."""
    arrays = dict(zip(ARRAYS, refs[sources:], strict=True))
    prologue_program(isa, geometry, Refs(x=None, square_partials=None, **arrays), refs[:sources])


@functools.cache
def _kernel(geometry: PrologueGeometry, sources: int):
    """Builds the kernel. ``run_program`` describes its arguments and results."""
    return lane_kernel(
        "graded_prologue_kernel",
        lambda isa, refs: run_program(isa, geometry, sources, refs),
        outputs=[
            jax.ShapeDtypeStruct((geometry.splits, 1, geometry.stored_n), jnp.float32),
            jax.ShapeDtypeStruct((1, COUNTING_CTAS, 2), jnp.float32),
        ],
        blocks=geometry.blocks,
        threads=geometry.threads,
        shared_bytes=geometry.shared_bytes,
    )
