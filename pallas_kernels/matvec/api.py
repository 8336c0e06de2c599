"""The public graded matvec: one function with several implementations, chosen by name or by device."""

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activations
from pallas_kernels.dispatch import first_supporting
from pallas_kernels.grading import GradingStats
from pallas_kernels.matvec import mosaic_gpu, reference, xla
from pallas_kernels.weight import NestedWeight
from pallas_kernels.x64 import without_x64

Implementation = Literal["reference", "xla", "mosaic_gpu"]

IMPLEMENTATIONS: dict[Implementation, ModuleType] = {
    "mosaic_gpu": mosaic_gpu,
    "xla": xla,
    "reference": reference,
}
"""Implementations by name, in order of preference. Each module has two functions: ``supports(x [rows, K],
weight)`` returns None, or the reason why it cannot run; ``partial_sums(x [rows, K], weight, thresholds
[rows, P])`` computes ``graded_partial_sums``."""


@without_x64
def graded_matvec(
    x: Float[Array, "*rows k"],
    weight: NestedWeight,
    thresholds: Float[Array, "*any p"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows"]]:
    """Computes ``y = x @ W``, and reads each input channel of W only at the level of its activation.

    Args:
      x: Activations ``[in_features]`` or ``[rows, in_features]``; float32, bfloat16 or float16.
      weight: The nested weight.
      thresholds: ``[P]``, or ``[rows, P]`` for different thresholds in each row; ascending, ``>= 0``.
        Channel j is read at level ``#{ l : |x_j| >= t_l }`` (see ``grading.levels``).
      implementation: Name of the implementation. The default is the first that supports the arguments and
        the device.

    Returns:
      ``(y, realised_bits)``: float32 ``[..., out_features]``, and float32 ``[...]`` mean bits read per
      weight in each row, without the scales' 0.125 bits. A NaN or Inf in a row of x makes that row of y
      non-finite.

    Raises:
      ValueError: Shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: No implementation supports the arguments, or the named one does not. The message
        gives the reasons.
    """
    _check(x, weight, thresholds)
    y, stats = graded_partial_sums(Activations.of(x), weight, thresholds, implementation=implementation)
    return y.array, stats.bits


@without_x64
def graded_partial_sums(
    x: Activations,
    weight: NestedWeight,
    thresholds: Float[Array, "*any p"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Activations, GradingStats]:
    """Computes ``graded_matvec``, but leaves the last sum to the kernel that reads the result.

    Args:
      x: Activations of any leading shape; partial sums and the factor of a norm may be left to this function.
      weight, implementation: See ``graded_matvec``.
      thresholds: ``[P]``, or ``[*leading, P]`` for different thresholds in each row.

    Returns:
      ``(y, stats)``: float32 partial sums of y with the leading shape of x, and the bits read and the largest
      activation of each row.

    Raises:
      ValueError, NotImplementedError: As ``graded_matvec``.
    """
    rows = x.reshape((-1,))
    shape = jax.ShapeDtypeStruct((*rows.leading, rows.features), rows.dtype)
    if thresholds.ndim > 1:
        thresholds = thresholds.reshape(-1, thresholds.shape[-1])
    _check(shape, weight, thresholds)
    thresholds = jnp.broadcast_to(thresholds, (shape.shape[0], weight.num_planes))
    chosen = IMPLEMENTATIONS[choose(shape, weight, implementation)]
    y, stats = chosen.partial_sums(rows, weight, thresholds)
    return y.reshape(x.leading), GradingStats(stats.packed.reshape(*x.leading, 2))


def choose(
    x: Array | jax.ShapeDtypeStruct, weight: NestedWeight, implementation: Implementation | None = None
) -> Implementation:
    """Returns the implementation that ``graded_matvec`` runs for these arguments on the default device.

    Looks only at shapes and dtypes, so x ``[rows, in_features]`` and the weight may be abstract.

    Raises:
      ValueError, NotImplementedError: As ``graded_matvec``.
    """
    return first_supporting(
        "no implementation of graded_matvec fits", IMPLEMENTATIONS, implementation, x, weight
    )


def _check(x, weight: NestedWeight, thresholds) -> None:
    """Raises ValueError, which names all problems, if the shapes or dtypes of the arguments do not fit."""
    problems = []
    if x.ndim not in (1, 2) or x.shape[-1] != weight.in_features:
        problems.append(
            f"x has shape {x.shape}, expected [rows, {weight.in_features}] or [{weight.in_features}]"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    rows = x.shape[0] if x.ndim == 2 else 1
    allowed = [(weight.num_planes,)] + ([(rows, weight.num_planes)] if x.ndim == 2 else [])
    if thresholds.shape not in allowed:
        problems.append(f"thresholds has shape {thresholds.shape}, expected {' or '.join(map(str, allowed))}")
    if problems:
        raise ValueError("graded_matvec: " + "; ".join(problems))
