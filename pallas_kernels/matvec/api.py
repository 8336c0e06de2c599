"""The public graded matvec: one function, several implementations, chosen by name or by device."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activations, PartialSums
from pallas_kernels.grading import GradingStats
from pallas_kernels.matvec import mosaic_gpu, reference, xla
from pallas_kernels.weight import NestedWeight

Implementation = Literal["reference", "xla", "mosaic_gpu"]

IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}
"""By name, in the order in which they are asked. Each has ``supports(x, weight)``, None or the reason
why not, and ``partial_sums(x, weight, thresholds [rows, P])``, see ``graded_partial_sums``."""


def graded_matvec(
    x: Float[Array, "*rows k"],
    weight: NestedWeight,
    thresholds: Float[Array, "*any p"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows"]]:
    """``y = x @ W`` where each input channel is read only at the level its activation deserves.

    Args:
      x: activations ``[in_features]`` or ``[rows, in_features]``; float32, bfloat16 or float16.
      weight: the nested weight.
      thresholds: ``[P]``, or ``[rows, P]`` for a set of thresholds per row; ascending, ``>= 0``;
        channel j is read at level ``#{ l : |x_j| >= t_l }`` (see ``grading.levels``).
      implementation: by name; by default the first that supports the arguments and the device.

    Returns:
      ``(y, realised_bits)``: float32 ``[..., out_features]``, and float32 ``[...]`` mean bits read per
      weight of each row, scales (0.125 bits) not counted. A NaN or Inf in x makes y non-finite.

    Raises:
      ValueError: shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: no (or not the named) implementation supports the arguments; says why.
    """
    _check(x, weight, thresholds)
    rows = x if x.ndim == 2 else x[None]
    sums, reading = graded_partial_sums(Activations(rows), weight, thresholds, implementation=implementation)
    y = sums.total()
    return (y, reading.bits) if x.ndim == 2 else (y[0], reading.bits[0])


def graded_partial_sums(
    x: Activations,
    weight: NestedWeight,
    thresholds: Float[Array, "*any p"],
    *,
    implementation: Implementation | None = None,
) -> tuple[PartialSums, GradingStats]:
    """``graded_matvec`` between neighbours that take part in its sums (see ``activations``).

    Args:
      x: activations, with parts of the norm that they still lack.
      weight, thresholds, implementation: as in ``graded_matvec``.

    Returns:
      ``(sums, reading)``: ``sums.total()`` is y, and ``reading`` what was found in x.

    Raises:
      ValueError, NotImplementedError: as ``graded_matvec``.
    """
    _check(x.values, weight, thresholds)
    thresholds = jnp.broadcast_to(thresholds, (x.values.shape[0], weight.num_planes))
    chosen = choose(x.values, weight, implementation)
    return IMPLEMENTATIONS[chosen].partial_sums(x, weight, thresholds)


def choose(
    x: Array | jax.ShapeDtypeStruct, weight: NestedWeight, implementation: Implementation | None = None
) -> Implementation:
    """The implementation that ``graded_matvec`` runs for these arguments on the default device.

    Looks at shapes and dtypes only: ``x`` is ``[rows, in_features]``, and it and the weight may be abstract.

    Raises:
      ValueError, NotImplementedError: as ``graded_matvec``.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}"
        )
    reasons = []
    for name in IMPLEMENTATIONS if implementation is None else (implementation,):
        reason = IMPLEMENTATIONS[name].supports(x, weight)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no implementation of graded_matvec fits: " + "; ".join(reasons))


def _check(x, weight: NestedWeight, thresholds) -> None:
    problems = []
    if x.ndim not in (1, 2) or x.shape[-1] != weight.in_features:
        problems.append(
            f"x has shape {x.shape}, expected [rows, {weight.in_features}] or [{weight.in_features}]"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    rows = x.shape[0] if x.ndim == 2 else 1
    fitting = [(weight.num_planes,)] + ([(rows, weight.num_planes)] if x.ndim == 2 else [])
    if thresholds.shape not in fitting:
        problems.append(f"thresholds has shape {thresholds.shape}, expected {' or '.join(map(str, fitting))}")
    if problems:
        raise ValueError("graded_matvec: " + "; ".join(problems))
