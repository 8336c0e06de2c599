"""The graded products of chosen experts on a GPU: one launch of the matvec program for all rows.

The launch runs ``matvec.mosaic_gpu.program`` with each activation row in its own row batch. A CTA loads the
expert of its row from device memory, together with the row's activations, and adds the offset of that expert
to the addresses of planes and scales. Weights are neither copied nor gathered, and the host does not know the
experts.

Every row reads the weights of its expert, also if other rows have the same expert. CTAs for the same tile and
channels of different rows are neighbours in the grid, so they share what they read through the L2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activations
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.grading import GradingStats
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.lanes.registers import Value
from pallas_kernels.matvec.mosaic_gpu import tuning
from pallas_kernels.matvec.mosaic_gpu.config import Config
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.kernel import ANY_CONFIG, OFFSET_LIMIT
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs
from pallas_kernels.matvec.mosaic_gpu.program import graded_matvec_program

MAX_ROWS = 128
"""Largest number of rows of a launch: 16 tokens of 8 experts. With more rows several share an expert, and it
pays to read each expert once (``xla``)."""

TYPICAL_ROWS = 8
"""Number of rows that the configuration of every launch is chosen for: a token of 8 experts. A configuration
that depended on the number of rows would change the order of sums, and a token's outputs would depend on the
tokens beside it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsGeometry(Geometry):
    """Sizes of a launch in which every row reads another weight: a row batch has one row.

    All other sizes are those of one expert's weight.

    Attributes:
      x_repeats: Number of consecutive rows that share a row of x: the experts of a token.
      threshold_repeats: Number of consecutive rows that share thresholds: the experts of a sequence's tokens.
    """

    x_repeats: int = 1
    threshold_repeats: int = 1

    @property
    def row_batches(self) -> int:
        return self.rows

    @property
    def rows_per_cta(self) -> int:
        return 1

    def x_row(self, row: Value) -> Value:
        return row if self.x_repeats == 1 else row // self.x_repeats

    def threshold_row(self, row: Value) -> Value:
        return row if self.threshold_repeats == 1 else row // self.threshold_repeats


def supports(x: jax.Array | jax.ShapeDtypeStruct, weight: NestedExperts) -> str | None:
    """Returns why the kernel cannot run for x ``[rows, K]`` on the target device, or None if it can."""
    rows = x.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, not {rows}"
    expert_bytes = 4 * weight.planes.size // weight.num_experts
    if expert_bytes > OFFSET_LIMIT:
        return f"addresses at most {OFFSET_LIMIT} bytes of planes of an expert, it has {expert_bytes}"
    return device.unsupported_reason()


def partial_sums(
    x: Activations,
    weight: NestedExperts,
    experts: jax.Array,
    thresholds: jax.Array,
    *,
    config: Config | None = None,
) -> tuple[Activations, GradingStats]:
    """Implements ``api.experts_matvec`` for x ``[rows, K]``, 1 to 128 rows.

    Args:
      x, weight, experts, thresholds: See ``api.IMPLEMENTATIONS``.
      config: Tuning of the launch. The default is the choice of ``tuning.rule``.
    """
    geometry = geometry_of(x, weight, config, threshold_repeats=x.leading[0] // len(thresholds))
    # The kernel always has these operands. Without a norm the program does not read ``squares``.
    squares = thresholds if x.square_partials is None else x.square_partials
    gains = jnp.ones(weight.num_planes) if weight.level_gains is None else weight.level_gains
    floats = [a.astype(jnp.float32) for a in (thresholds, squares, gains)]
    kernel = _experts_kernel(geometry)
    partials, stats = kernel(
        experts.astype(jnp.int32), x.stored_values, *floats, weight.planes, weight.scales
    )
    return Activations.sums(partials, weight.out_features), GradingStats(stats)


def geometry_of(
    x: Activations, weight: NestedExperts, config: Config | None = None, *, threshold_repeats: int = 1
) -> ExpertsGeometry:
    """Returns the sizes of the launch that ``partial_sums`` makes for these arguments."""
    geometry = ExpertsGeometry(
        in_features=weight.in_features,
        stored_k=weight.planes.shape[-2],
        stored_n=weight.scales.shape[-1],
        planes=weight.num_planes,
        rows=x.leading[0],
        x_dtype=x.dtype.name,
        config=config or ANY_CONFIG,
        num_square_partials=0 if x.square_partials is None else x.square_partials.shape[1],
        eps=x.eps,
        x_repeats=x.repeats,
        threshold_repeats=threshold_repeats,
    )
    if config is None:
        typical = dataclasses.replace(geometry, rows=TYPICAL_ROWS)
        config = tuning.rule(typical, device.multiprocessors(device.target_device()))
    return dataclasses.replace(geometry, config=config)


def run_program(isa: Instructions, geometry: ExpertsGeometry, refs: list) -> None:
    """Runs the lane program. The refs are ``Refs.experts``, then the other fields of ``Refs`` in order."""
    experts, *others = refs
    graded_matvec_program(isa, geometry, dataclasses.replace(Refs(*others), experts=experts))


@functools.cache
def _experts_kernel(geometry: ExpertsGeometry):
    """Builds the kernel. ``run_program`` describes its arguments and results."""
    return lane_kernel(
        "graded_experts_kernel",
        lambda isa, refs: run_program(isa, geometry, list(refs)),
        outputs=[
            jax.ShapeDtypeStruct((geometry.splits, geometry.rows, geometry.stored_n), jnp.float32),
            jax.ShapeDtypeStruct((geometry.rows, 2), jnp.float32),
        ],
        blocks=geometry.blocks,
        threads=geometry.threads,
        shared_bytes=geometry.shared_bytes,
    )
