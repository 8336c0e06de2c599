"""The product of many rows with the kernels of their experts: one launch for all experts, on Hopper.

Rows are sorted by expert, and each expert's rows are filled up to whole blocks. A CTA multiplies one block of
rows by a tile of the outputs of the block's expert. So the work is that of the rows, plus at most one partly
filled block for each expert, however unevenly the rows choose their experts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.experts.sorting import sort_by_expert
from pallas_kernels.lanes import device

STEP_CHANNELS = 64
"""Input channels that a step of the pipeline copies and multiplies: a line of 128 bytes of a row."""


class Tiling(NamedTuple):
    """Sizes of a launch.

    Attributes:
      block: Rows of a block, a multiple of 64.
      tile: Outputs of a CTA, a multiple of 64 that divides the number of outputs.
      steps: Steps of ``STEP_CHANNELS`` channels whose copies are under way or in use, at least 2.
    """

    block: int
    tile: int
    steps: int


def tiling(rows: int, num_experts: int, outputs: int) -> Tiling:
    """Returns the sizes for a number of rows: large blocks if an expert fills one on average."""
    block, steps = (128, 3) if rows >= 128 * num_experts else (64, 4)
    return Tiling(block, 64 if outputs % 128 else 128, steps)


class Grouping(NamedTuple):
    """Where the rows of a product lie when each expert's rows are filled up to whole blocks.

    Attributes:
      sources: Row at each place of the blocks, an index into the rows; any row where a block is filled up.
      places: Place of each row; rows without an expert have the place 0.
      block_experts: Expert of each block.
      used: Number of blocks that have rows, an array of one number; they come first.
    """

    sources: Int[Array, "places"]
    places: Int[Array, "rows"]
    block_experts: Int[Array, "blocks"]
    used: Int[Array, "1"]


def group(experts: Int[Array, "rows"], num_experts: int, block: int) -> Grouping:
    """Returns the grouping of rows in blocks of ``block`` rows.

    Args:
      experts: Expert of each row; rows of expert ``num_experts`` are in no block.
      num_experts: Number of experts.
      block: Rows of a block.
    """
    count = len(experts)
    # Every block has a row, and all blocks of an expert but one are full.
    most = min(count, count // block + num_experts)
    order, counts, starts, rank = sort_by_expert(experts, num_experts)
    last = jnp.cumsum(-(-counts // block))
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), last[:-1]])  # block of an expert
    blocks = jnp.arange(most, dtype=jnp.int32)
    of_block = jnp.minimum(jnp.sum(last <= blocks[:, None], axis=1, dtype=jnp.int32), num_experts - 1)
    ranks = ((blocks - first[of_block]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)
    sources = order[jnp.minimum(starts[of_block][:, None] + ranks, count - 1).reshape(-1)]
    places = jnp.where(experts < num_experts, first.at[experts].get(mode="clip") * block + rank, 0)
    # Without the barrier XLA computes these indices anew for every number that it gathers with them.
    return jax.lax.optimization_barrier(Grouping(sources, places, of_block, last[-1:]))


def supports(
    rows: Array | jax.ShapeDtypeStruct, kernel: Array | jax.ShapeDtypeStruct, transposed: bool = False
) -> str | None:
    """Returns why the kernel cannot run for these arguments on the target device, or None if it can."""
    in_features, outputs = kernel.shape[1:][::-1] if transposed else kernel.shape[1:]
    if not rows.dtype == kernel.dtype == jnp.bfloat16:
        return f"multiplies bfloat16, not {rows.dtype} by {kernel.dtype}"
    if in_features % STEP_CHANNELS or outputs % 64:
        return f"takes multiples of 64 channels and outputs, not {in_features} and {outputs}"
    return device.unsupported_reason() or device.no_warpgroup_products_reason()


def grouped_product(
    rows: BFloat16[Array, "rows k"],
    kernel: BFloat16[Array, "e k n"] | BFloat16[Array, "e n k"],
    experts: Int[Array, "rows"],
    num_experts: int,
    transposed: bool = False,
    *,
    sizes: Tiling | None = None,
    interpret: object = None,
) -> Float[Array, "rows n"]:
    """Returns ``rows[r] @ kernel[experts[r]]``, float32.

    Args:
      rows: Rows.
      kernel: Kernels of all experts, or of a group. ``supports`` must give no reason against rows and kernel.
      experts: Expert of each row, an index into ``kernel``; rows of expert ``len(kernel)`` get zeros.
      num_experts: Number of all experts.
      transposed: Whether the kernels are ``[experts, n, k]``.
      sizes: Sizes of the launch, by default those of ``tiling``.
      interpret: Mosaic GPU's parameters for a run on a CPU; for tests.
    """
    outputs = kernel.shape[1 if transposed else 2]
    sizes = sizes or tiling(len(rows), num_experts, outputs)
    grouping = group(experts, len(kernel), sizes.block)
    launch = _launch(sizes, len(grouping.block_experts), rows.shape[1], outputs, transposed, interpret)
    products = launch(grouping.block_experts, grouping.used, rows[grouping.sources], kernel)
    return jnp.where((experts < len(kernel))[:, None], products[grouping.places], 0)


@functools.cache
def _launch(
    sizes: Tiling, blocks: int, in_features: int, outputs: int, transposed: bool, interpret: object
) -> Callable[..., jax.Array]:
    """Builds the kernel: expert of each block, number of blocks in use, rows, kernels -> products."""
    # Mosaic GPU is imported only when a kernel is built (see ``lanes.launch``).
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    block, tile, steps = sizes

    def grouped_product_kernel(block_experts, used, rows, kernels, products):
        # CTAs of a block are neighbours, and so are the blocks of an expert: they share lines in the L2.
        index, column = jax.lax.axis_index("block"), jax.lax.axis_index("tile")

        @pl.when(index < used[0])
        def _():
            kernel = kernels.at[block_experts[index]]

            def multiply(sums):
                def step(_, rows, kernel):
                    kernel = kernel.transpose((1, 0)) if transposed else kernel
                    plgpu.wgmma(sums, rows, kernel)

                plgpu.emit_pipeline(
                    step,
                    grid=(in_features // STEP_CHANNELS,),
                    in_specs=[
                        plgpu.BlockSpec((block, STEP_CHANNELS), lambda k: (index, k), delay_release=1),
                        plgpu.BlockSpec((tile, STEP_CHANNELS), lambda k: (column, k), delay_release=1)
                        if transposed
                        else plgpu.BlockSpec((STEP_CHANNELS, tile), lambda k: (k, column), delay_release=1),
                    ],
                    max_concurrent_steps=steps,
                )(rows, kernel)
                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((block, tile), jnp.float32))
            products[pl.ds(index * block, block), pl.ds(column * tile, tile)] = sums

    return plgpu.kernel(
        grouped_product_kernel,
        out_type=jax.ShapeDtypeStruct((blocks * block, outputs), jnp.float32),
        grid=(blocks, outputs // tile),
        grid_names=("block", "tile"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
