"""The launch of the graded matvec on a GPU: supported arguments, sizes and operands."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.activations import Activations
from pallas_kernels.grading import GradingStats
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.matvec.mosaic_gpu import tuning
from pallas_kernels.matvec.mosaic_gpu.byte_pairs import BytePairGeometry, byte_pair_program
from pallas_kernels.matvec.mosaic_gpu.config import Config
from pallas_kernels.matvec.mosaic_gpu.dense_rows import DenseRowsGeometry, dense_rows_program
from pallas_kernels.matvec.mosaic_gpu.geometry import MAX_ROWS, Geometry
from pallas_kernels.matvec.mosaic_gpu.program import Refs, graded_matvec_program
from pallas_kernels.weight import NestedWeight

OFFSET_LIMIT = 2**32
"""Largest number of bytes of planes, because list entries hold offsets of 32 bits."""

ANY_CONFIG = Config(warpgroups=1, warps_per_group=4, ring_slots=4)
"""Placeholder in a ``Geometry`` until ``tuning`` has chosen the configuration."""


def supports(x: Array | jax.ShapeDtypeStruct, weight: NestedWeight) -> str | None:
    """Returns why the kernel cannot run for these arguments on the target device, or None if it can."""
    if not x.shape[0]:
        return "takes at least one row"
    plane_bytes = 4 * weight.planes.size
    if plane_bytes > OFFSET_LIMIT:
        return f"addresses at most {OFFSET_LIMIT} bytes of planes, the weight has {plane_bytes}"
    return device.unsupported_reason()


def graded_matvec(
    x: Float[Array, "rows k"],
    weight: NestedWeight,
    thresholds: Float[Array, "rows p"],
    *,
    config: Config | None = None,
) -> tuple[Float32[Array, "rows n"], Float32[Array, "rows"]]:
    """Implements ``api.graded_matvec`` for x ``[rows, K]`` (see ``partial_sums``)."""
    y, stats = partial_sums(Activations.of(x), weight, thresholds, config=config)
    return y.array, stats.bits


def partial_sums(
    x: Activations,
    weight: NestedWeight,
    thresholds: Float[Array, "rows p"],
    *,
    config: Config | None = None,
) -> tuple[Activations, GradingStats]:
    """Implements ``api.graded_partial_sums``. More than 16 rows take several launches, and give one sum.

    A row's result is bitwise independent of the number and the content of the other rows.

    Args:
      x: Activations ``[rows, K]``.
      weight, thresholds: See ``api.graded_partial_sums``.
      config: Tuning of the launches. The default is the choice of ``tuning.best_config``.
    """
    if x.leading[0] <= MAX_ROWS:
        return _launch(x, weight, thresholds, config)

    def summed(values, squares, thresholds) -> tuple[jax.Array, jax.Array]:
        y, stats = _launch(Activations.of(values, squares, x.eps), weight, thresholds, config)
        return y.array, stats.packed

    rows = x.values, x.square_partials, thresholds
    batches, rest = divmod(x.leading[0], MAX_ROWS)
    end = batches * MAX_ROWS
    by_batch = jax.tree.map(lambda array: array[:end].reshape(batches, MAX_ROWS, -1), rows)
    results = jax.lax.map(lambda batch: summed(*batch), by_batch)
    y, stats = jax.tree.map(lambda array: array.reshape(end, -1), results)
    if rest:
        last_y, last_stats = summed(*jax.tree.map(lambda array: array[end:], rows))
        y, stats = jnp.concatenate([y, last_y]), jnp.concatenate([stats, last_stats])
    return Activations.of(y), GradingStats(stats)


def _launch(
    x: Activations, weight: NestedWeight, thresholds: Float[Array, "rows p"], config: Config | None
) -> tuple[Activations, GradingStats]:
    """Runs ``partial_sums`` for up to 16 rows in one launch."""
    geometry = geometry_of(x, weight, config)
    # The kernel always has these operands. Without a norm the program does not read ``squares``.
    squares = thresholds if x.square_partials is None else x.square_partials
    gains = jnp.ones(weight.num_planes) if weight.level_gains is None else weight.level_gains
    floats = [a.astype(jnp.float32) for a in (thresholds, squares, gains)]
    partials, stats = _matvec_kernel(geometry)(x.values, *floats, weight.planes, weight.scales)
    return Activations.sums(partials, weight.out_features), GradingStats(stats)


def geometry_of(x: Activations, weight: NestedWeight, config: Config | None = None) -> Geometry:
    """Returns the sizes of the launch that ``partial_sums`` makes for these arguments."""
    geometry = Geometry(
        in_features=weight.in_features,
        stored_k=weight.planes.shape[-2],
        stored_n=weight.scales.shape[-1],
        planes=weight.num_planes,
        rows=x.leading[0],
        x_dtype=x.dtype.name,
        config=config or ANY_CONFIG,
        num_square_partials=0 if x.square_partials is None else x.square_partials.shape[1],
        eps=x.eps,
    )
    if config is None:
        target = device.target_device()
        config = tuning.best_config(
            geometry,
            device_kind=target.device_kind,
            multiprocessors=device.multiprocessors(target),
            warpgroups=device.no_warpgroup_products_reason() is None,
        )
    program = Geometry
    if config.dense_rows is not None:
        program = DenseRowsGeometry
    elif config.byte_pairs is not None:
        program = BytePairGeometry
    return program(**{**vars(geometry), "config": config})


def run_program(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """Runs the lane program that these sizes belong to."""
    if isinstance(geometry, DenseRowsGeometry):
        dense_rows_program(isa, geometry, refs)
    elif isinstance(geometry, BytePairGeometry):
        byte_pair_program(isa, geometry, refs)
    else:
        graded_matvec_program(isa, geometry, refs)


@functools.cache
def _matvec_kernel(geometry: Geometry):
    """Builds the kernel. ``lane_context.Refs`` describes its arguments and results."""
    return lane_kernel(
        "graded_matvec_kernel",
        lambda isa, refs: run_program(isa, geometry, Refs(*refs)),
        outputs=[
            jax.ShapeDtypeStruct((geometry.splits, geometry.rows, geometry.stored_n), jnp.float32),
            jax.ShapeDtypeStruct((geometry.rows, 2), jnp.float32),
        ],
        blocks=geometry.blocks,
        threads=geometry.threads,
        shared_bytes=geometry.shared_bytes,
    )
