"""The public graded product of rows with their experts, with several implementations."""

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import Activations
from pallas_kernels.dispatch import first_supporting
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import mosaic_gpu, reference, xla
from pallas_kernels.grading import GradingStats
from pallas_kernels.x64 import without_x64

ExpertsImplementation = Literal["reference", "xla", "mosaic_gpu"]

IMPLEMENTATIONS: dict[ExpertsImplementation, ModuleType] = {
    "mosaic_gpu": mosaic_gpu,
    "xla": xla,
    "reference": reference,
}
"""Implementations by name, in order of preference. Each module has two functions: ``supports(x [rows, K],
weight)`` returns None, or the reason why it cannot run; ``partial_sums(x [rows, K], weight, experts [rows],
thresholds [n, P])`` computes ``experts_matvec``, where each row of thresholds serves ``rows / n`` consecutive
rows."""


@without_x64
def experts_matvec(
    x: Activations,
    weight: NestedExperts,
    experts: Int[Array, "*leading"],
    thresholds: Float[Array, "*any p"],
    *,
    implementation: ExpertsImplementation | None = None,
) -> tuple[Activations, GradingStats]:
    """Computes ``y[r] = x[r] @ W[experts[r]]``, and reads each input channel only at its level.

    A token of a mixture is as many rows as it has chosen experts. Only the weights of experts that occur in
    ``experts`` are read, and of them only the digits that a level reaches. Indices are read on the device.

    Args:
      x: Activations ``[*leading, in_features]``, float32, bfloat16 or float16; partial sums and the factor of
        a norm may be left to this function.
      weight: Nested weights of all experts.
      experts: int32 expert of each row, in ``0..E - 1``; not checked. Rows may share an expert.
      thresholds: ``[P]``, or ``[*leading, P]`` for different thresholds in each row, where an axis of rows
        with equal thresholds may have length 1; ascending, ``>= 0``. Channel j of row r is read at level
        ``#{ l : |x_rj| >= t_l }`` (see ``grading.levels``).
      implementation: Name of the implementation. The default is the first that supports the arguments and
        the device.

    Returns:
      ``(y, stats)``: float32 partial sums of y ``[*leading, out_features]``, and the bits read and the
      largest activation of each row ``[*leading]``.

    Raises:
      ValueError: Shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: No implementation supports the arguments, or the named one does not. The message
        gives the reasons.
    """
    rows = x.reshape((-1,))
    shape = jax.ShapeDtypeStruct((*rows.leading, rows.features), rows.dtype)
    _check(x, weight, experts, thresholds)
    thresholds = _distinct(thresholds, x.leading)
    chosen = IMPLEMENTATIONS[choose(shape, weight, implementation)]
    y, stats = chosen.partial_sums(rows, weight, experts.reshape(-1), thresholds)
    return y.reshape(x.leading), GradingStats(stats.packed.reshape(*x.leading, 2))


def choose(
    x: Array | jax.ShapeDtypeStruct,
    weight: NestedExperts,
    implementation: ExpertsImplementation | None = None,
) -> ExpertsImplementation:
    """Returns the implementation that ``experts_matvec`` runs for these arguments on the default device.

    Looks only at shapes and dtypes, so x ``[rows, in_features]`` and the weight may be abstract.

    Raises:
      ValueError, NotImplementedError: As ``experts_matvec``.
    """
    return first_supporting(
        "no implementation of experts_matvec fits", IMPLEMENTATIONS, implementation, x, weight
    )


def _check(x: Activations, weight: NestedExperts, experts, thresholds) -> None:
    """Raises ValueError, which names all problems, if the shapes or dtypes of the arguments do not fit."""
    problems = []
    if x.features != weight.in_features:
        problems.append(f"x has {x.features} features, expected {weight.in_features}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if experts.shape != x.leading or not jnp.issubdtype(experts.dtype, jnp.integer):
        problems.append(f"experts is {experts.dtype} {experts.shape}, expected integers {x.leading}")
    allowed = [(weight.num_planes,), (*x.leading, weight.num_planes)]
    given = thresholds.shape
    fits = len(given) == len(allowed[1]) and all(
        length in (1, full) for length, full in zip(given[:-1], x.leading, strict=True)
    )
    if given[-1:] != (weight.num_planes,) or not (fits or len(given) == 1):
        problems.append(f"thresholds has shape {thresholds.shape}, expected {' or '.join(map(str, allowed))}")
    if problems:
        raise ValueError("experts_matvec: " + "; ".join(problems))


def _distinct(thresholds: Float[Array, "*any p"], leading: tuple[int, ...]) -> Float[Array, "n p"]:
    """Returns thresholds ``[n, P]``, each of them for as many consecutive rows.

    A copy for each row would be a small XLA kernel in each layer of a decode step.
    """
    shape = (*(1,) * (len(leading) + 1 - thresholds.ndim), *thresholds.shape)
    shared = len(leading)  # Axes from here on share thresholds.
    while shared and shape[shared - 1] == 1:
        shared -= 1
    thresholds = thresholds.reshape(*shape[:shared], shape[-1])
    return jnp.broadcast_to(thresholds, (*leading[:shared], shape[-1])).reshape(-1, shape[-1])
