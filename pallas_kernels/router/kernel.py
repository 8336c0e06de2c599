"""The router of a mixture of experts on a GPU: one launch for up to 16 rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import Activations
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.router.geometry import CLUSTER, MOST_EXPERTS, MOST_FEATURES, VECTOR, RouterGeometry
from pallas_kernels.router.program import RouterRefs, router_program

MAX_ROWS = 16
"""Largest number of rows of a launch. Every row reads the router's kernel."""


class Routed(NamedTuple):
    """The experts of each row.

    Attributes:
      experts: int32 experts, those with the largest scores first, equal ones in ascending order.
      probabilities: float32 factors of their results.
      inputs: Inputs of each expert: x times the expert's grading factor (see ``grading_factor``).
    """

    experts: Int[Array, "*leading c"]
    probabilities: Float[Array, "*leading c"]
    inputs: Activations


def supports(x: Activations, kernel: Array | jax.ShapeDtypeStruct, chosen: int) -> str | None:
    """Returns why ``route`` cannot run for these arguments on the target device, or None if it can."""
    features, experts = kernel.shape
    rows = math.prod(x.leading)
    if not 1 <= rows <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, not {rows}"
    if x.dtype != jnp.bfloat16 or len(x.partials) != 1:
        return f"takes bfloat16 activations, not {len(x.partials)} partial sums of {x.dtype.name}"
    if features % VECTOR or features > MOST_FEATURES:
        return f"takes a multiple of {VECTOR} up to {MOST_FEATURES} features, not {features}"
    if (reason := lacks(experts, chosen)) is not None:
        return reason
    if kernel.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes a kernel of bfloat16 or float32, not {kernel.dtype.name}"
    return device.unsupported_reason(device.CLUSTERS)


def lacks(experts: int, chosen: int) -> str | None:
    """Returns why no launch can choose ``chosen`` of this number of experts, or None if one can."""
    if experts > MOST_EXPERTS or experts % 2:
        return f"takes an even number of up to {MOST_EXPERTS} experts, not {experts}"
    if chosen > LANES:
        return f"chooses at most {LANES} experts, not {chosen}"
    return None


def route(
    x: Activations,
    kernel: Float[Array, "d e"],
    chosen: int,
    *,
    normalized: bool,
    bias: Float[Array, "e"] | None = None,
) -> Routed:
    """Chooses the experts of each row of x: those with the largest ``softmax(x @ kernel + bias)``.

    Args:
      x: Activations ``[*leading, d]``, bfloat16, 1 to 16 rows; the factor of a norm may be left to this
        function.
      kernel: Kernel of the router, bfloat16, or float32, which is rounded to bfloat16.
      chosen: Number of experts that are chosen for each row.
      normalized: Whether the chosen probabilities are divided by their sum.
      bias: Bias of the scores; None for none.

    Returns:
      Experts, probabilities and inputs ``[*leading, chosen]``. The inputs share the values of x.
    """
    rows = x.reshape((-1,))
    squares = rows.square_partials
    geometry = RouterGeometry(
        rows=rows.leading[0],
        features=x.features,
        experts=kernel.shape[1],
        chosen=chosen,
        normalized=normalized,
        kernel_bytes=kernel.dtype.itemsize,
        num_square_partials=0 if squares is None else squares.shape[1],
        eps=x.eps,
        biased=bias is not None,
    )
    # The kernel always has this operand. Without a norm the program does not read it.
    squares = jnp.ones((geometry.rows, 1)) if squares is None else squares
    biases = () if bias is None else (bias.astype(jnp.float32),)
    outputs = _router_kernel(geometry)(rows.partials[0], squares.astype(jnp.float32), kernel, *biases)
    experts, probabilities, mean_squares = (a.reshape(*x.leading, chosen) for a in outputs)
    inputs = Activations.of(x.partials[0][..., None, :], mean_squares[..., None], repeats=chosen)
    return Routed(experts, probabilities, inputs)


@functools.cache
def _router_kernel(geometry: RouterGeometry):
    """Builds the kernel. ``RouterRefs`` describes its arguments and results."""
    shape = geometry.rows, geometry.chosen

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        x, squares, kernel, *bias, experts, probabilities, mean_squares, shared = refs
        arrays = x, squares, kernel, experts, probabilities, mean_squares, shared
        router_program(isa, geometry, RouterRefs(*arrays, *bias))

    return lane_kernel(
        "router_kernel",
        program,
        outputs=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
        blocks=geometry.blocks,
        threads=geometry.threads,
        shared_bytes=geometry.shared_bytes,
        cluster=CLUSTER,
    )
