"""Fits the weights of a projection to its graded inputs, by one step of damped least squares.

Let ``x`` be the inputs of a projection in the original model, ``z`` its inputs at some bits, zero where they
are skipped, and ``h_x`` and ``h_z`` the residual stream of the two models. The new weights come closest to
the original ``W`` both on ``z`` and, so that full precision stays what it was, on ``x``:

    ``W' = argmin E|z W' - y|**2 + c E|x W' - x W|**2``

If the projection writes the residual stream, its outputs also compensate the error of the stream so far:
``y = x W + (h_x - h_z)``. Otherwise ``y = x W``. With ``A = z^T z + c x^T x``, damped, and
``G = z^T (y - z W)`` the solution is ``W' = W + A^-1 G``. (GPTAQ, arXiv 2504.02692, fits quantized inputs to
original outputs. Here the errors come from grading.) ``refitted_codes`` says how much of the step is taken.

Without a deficit ``G = (z^T (x - z)) W``. The residuals of all outputs then follow from K x K matrices, which
one pass over the windows computes.

A fit of K numbers to T tokens also fits noise: by chance it removes ``K / T`` of the residual energy. The
step is shortened by the share of the whole reduction that is due to chance (James and Stein 1961).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_tools.calibration.statistics import first_scored_position

FULL_PRECISION_WEIGHT = 2.0
"""``c``: weight of the model at full precision."""

DAMPING = 0.1
"""Share of the mean of the diagonal of ``A`` that is added to the diagonal. It holds back the weights of
inputs that the calibration text hardly excites, which another text may excite."""


class FitWindow(NamedTuple):
    """One window in front of a projection.

    Attributes:
      exact: Inputs ``x`` in the original model.
      graded: Inputs in the graded model, before small ones are skipped.
      deficit: ``h_x - h_z`` for some outputs; None if the projection does not write the residual stream.
    """

    exact: Float[Array, "t k"]
    graded: Float[Array, "t k"]
    deficit: Float[Array, "t n"] | None


class Moments(NamedTuple):
    """Sums over the inputs of a projection, equal for all its outputs.

    Attributes:
      a_factor: Cholesky factor of the damped ``A``.
      cross: ``z^T (x - z)``; None if the projection writes the residual stream.
      error: ``(x - z)^T (x - z)``; None if the projection writes the residual stream.
    """

    a_factor: Float[Array, "k k"]
    cross: Float[Array, "k k"] | None
    error: Float[Array, "k k"] | None


def moments(windows: Sequence[FitWindow], least_read: Float[Array, ""] | float) -> Moments | None:
    """Sums over all windows; None if there are no more tokens than inputs.

    Args:
      windows: All windows. The values of the deficits are not used, only whether there are any.
      least_read: Smallest magnitude of a graded input that is not skipped.
    """
    k = windows[0].exact.shape[1]
    if _scored_tokens(windows) <= k:  # The whole reduction would be chance.
        return None
    a, cross = jnp.zeros((k, k)), jnp.zeros((k, k))
    if windows[0].deficit is not None:
        for window in windows:
            # Waits for each product, which is as large as A.
            a = _add_squares(a, window.graded, least_read, 1.0).block_until_ready()
            a = _add_squares(a, window.exact, jnp.float32(0), FULL_PRECISION_WEIGHT).block_until_ready()
        return Moments(_cholesky(a), None, None)
    error = jnp.zeros((k, k))
    for window in windows:
        a, cross, error = _add_moments(a, cross, error, window.exact, window.graded, least_read)
        error.block_until_ready()
    return Moments(_cholesky(a), cross, error)


def refitted(
    w: Float[Array, "k n"],
    windows: Sequence[FitWindow],
    least_read: Float[Array, ""] | float,
    moments: Moments | None,
) -> Float[Array, "k n"]:
    """Returns ``W'``, float32.

    Args:
      w: ``W``, or some of its outputs.
      windows: All windows, with the deficits of these outputs.
      least_read: Smallest magnitude of a graded input that is not skipped.
      moments: Result of ``moments``; None leaves the weights as they are.
    """
    w = jnp.asarray(w, jnp.float32)
    if moments is None:
        return w
    if moments.cross is not None:
        g, energy = _residuals(moments.cross, moments.error, w)
    else:
        g, energy = jnp.zeros(w.shape), jnp.zeros(())
        for window in windows:
            g, energy = _add_residuals(g, energy, *window, least_read, w)
            energy.block_until_ready()
    return _step(w, moments.a_factor, g, energy, _scored_tokens(windows))


def _scored_tokens(windows: Sequence[FitWindow]) -> int:
    lengths = [len(window.graded) for window in windows]
    return sum(length - first_scored_position(length) for length in lengths)


def _scored_inputs(rows: Float[Array, "t k"], least_read: Float[Array, ""] | float) -> Float[Array, "t2 k"]:
    """Returns the inputs at the scored positions, zero where they are skipped."""
    rows = rows[first_scored_position(len(rows)) :].astype(jnp.float32)
    return jnp.where(jnp.abs(rows) < least_read, 0, rows)


@jax.jit(donate_argnums=0)
def _add_squares(
    a: Float[Array, "k k"],
    rows: Float[Array, "t k"],
    least_read: Float[Array, ""] | float,
    weight: Float[Array, ""] | float,
) -> Float[Array, "k k"]:
    rows = _scored_inputs(rows, least_read)
    return a + weight * _product(rows.T, rows)


@jax.jit(donate_argnums=(0, 1, 2))
def _add_moments(
    a: Float[Array, "k k"],
    cross: Float[Array, "k k"],
    error: Float[Array, "k k"],
    exact: Float[Array, "t k"],
    graded: Float[Array, "t k"],
    least_read: Float[Array, ""] | float,
) -> tuple[Float[Array, "k k"], Float[Array, "k k"], Float[Array, "k k"]]:
    """Adds one window to ``A``, ``z^T (x - z)`` and ``(x - z)^T (x - z)``."""
    x, z = _scored_inputs(exact, 0.0), _scored_inputs(graded, least_read)
    zz, zx, xx = _product(z.T, z), _product(z.T, x), _product(x.T, x)
    return a + zz + FULL_PRECISION_WEIGHT * xx, cross + zx - zz, error + xx - zx - zx.T + zz


@jax.jit
def _residuals(
    cross: Float[Array, "k k"], error: Float[Array, "k k"], w: Float[Array, "k n"]
) -> tuple[Float[Array, "k n"], Float[Array, ""]]:
    """Returns ``G`` and ``|y - z W|**2`` without a deficit."""
    return _product(cross, w), jnp.sum(w * _product(error, w))


@jax.jit(donate_argnums=0)
def _cholesky(a: Float[Array, "k k"]) -> Float[Array, "k k"]:
    damped = a + DAMPING * jnp.trace(a) / len(a) * jnp.eye(len(a))
    # A projection whose inputs are all zero has nothing to fit.
    return jnp.linalg.cholesky(jnp.where(jnp.trace(a) > 0, damped, jnp.eye(len(a))))


@jax.jit(donate_argnums=(0, 1))
def _add_residuals(
    g: Float[Array, "k n"],
    energy: Float[Array, ""],
    exact: Float[Array, "t k"],
    graded: Float[Array, "t k"],
    deficit: Float[Array, "t n"],
    least_read: Float[Array, ""] | float,
    w: Float[Array, "k n"],
) -> tuple[Float[Array, "k n"], Float[Array, ""]]:
    """Adds one window to ``G`` and to ``|y - z W|**2``."""
    x, z = _scored_inputs(exact, 0.0), _scored_inputs(graded, least_read)
    residual = _product(x - z, w) + deficit[first_scored_position(len(graded)) :].astype(jnp.float32)
    return g + _product(z.T, residual), energy + jnp.sum(residual**2)


@jax.jit
def _step(
    w: Float[Array, "k n"],
    a_factor: Float[Array, "k k"],
    g: Float[Array, "k n"],
    energy: Float[Array, ""],
    tokens: Int[Array, ""] | int,
) -> Float[Array, "k n"]:
    """Returns ``W + A^-1 G``, the step shortened by the share of its reduction that is chance."""
    step = jax.scipy.linalg.cho_solve((a_factor, True), g)
    reduction = jnp.sum(step * g)
    # A includes c x^T x, which holds the weights in place and so reduces the share of chance by 1 + c.
    chance = len(w) / tokens * energy / (1 + FULL_PRECISION_WEIGHT)
    return w + step * jnp.where(reduction > chance, 1 - chance / reduction, 0)


def _product(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    return jnp.matmul(a, b, precision="highest")
