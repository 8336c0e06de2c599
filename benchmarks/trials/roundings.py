"""Trials of other ways to round the layers. The output projection is rounded as in the product.

Weights are not refitted, and level gains are fitted, so nothing else compensates for errors of a rounding.

* ``scale-search``: each group takes the scale with the least squared error, from 0.6 to 1 times max-abs. The
  error of each level is weighted by the energy of the activations that are read at it.
* ``scale-search-plain``: the same with equal weights for all levels.
* ``graded-gptq``: GPTQ (``checkpoints_tools.baselines.gptq``) on nested codes. A channel passes the mean of
  its levels' errors on to later channels, weighted by each level's share of the channel's energy.

Shares of energy assume normal activations with each channel's second moment, at the thresholds that give the
layer alone a mean of ``BITS``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from trial import PLAIN_WEIGHTS, Trial, rounded

from checkpoints_tools.baselines.model import mean_moments
from checkpoints_tools.calibration import statistics as calibration
from checkpoints_tools.calibration.allocation import GradedCosts, threshold_tables
from checkpoints_tools.quantizers import Quantizer, RoundedWeight, rtn
from pallas_kernels import codes, layout

BITS = 3.0
SHRUNK = np.arange(0.6, 1.01, 0.05)
DAMPING = 0.01
LEVELS = 4


def rounded_by(quantizer: Quantizer) -> Callable[[], AbstractContextManager]:
    """Returns a ``change`` that rounds layers with ``quantizer``, whose statistics include second moments."""
    through_layer = calibration.through_layer

    def with_moments(layer, hidden):
        moments = mean_moments(layer, hidden)
        inputs = through_layer(layer, hidden)
        for name, seen in inputs.items():
            seen.moments = moments[name][0]
        return inputs

    return rounded(with_moments, quantizer)


def level_energies(w: jax.Array, statistics) -> np.ndarray:
    """Returns the energy ``E[x_j**2]`` of each channel by the level that it is read at, ``[K, P + 1]``."""
    errors = np.asarray(codes.level_errors(w, codes.quantize(w)), np.float64)
    alone = {"layer": GradedCosts(statistics.counts, errors, w.size)}
    thresholds = threshold_tables(alone, (BITS, 8.0))["layer"][0].astype(np.float64)
    energy = np.maximum(np.asarray(jnp.diagonal(statistics.moments), np.float64), 1e-30)
    z = thresholds / np.sqrt(energy)[:, None]
    below = np.asarray(jax.scipy.special.erf(z / np.sqrt(2))) - z * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2)
    edges = np.concatenate([np.zeros((len(z), 1)), below, np.ones((len(z), 1))], axis=1)
    return energy[:, None] * np.diff(edges, axis=1)


def scale_search(w: jax.Array, statistics, *, name: str, weighted: bool) -> RoundedWeight:
    """Rounds as the module describes; a ``Quantizer``."""
    if not hasattr(statistics, "moments"):
        return rtn(w, statistics, name=name)
    energies = level_energies(w, statistics) if weighted else np.ones((len(w), LEVELS + 1))
    most = codes.max_abs_scales(w)
    best, least = None, None
    for factor in SHRUNK[::-1]:
        scales = (most.astype(jnp.float32) * factor).astype(jnp.float16)
        candidate = codes.from_codes(codes.encode(w, scales), scales)
        lost = sum(
            energies[:, level, None] * (w - codes.dequantize(candidate, level)) ** 2
            for level in range(1, LEVELS + 1)
        )
        lost = jnp.pad(lost, ((0, -len(w) % layout.GROUP), (0, 0)))
        lost = lost.reshape(-1, layout.GROUP, w.shape[1]).sum(axis=1)
        better = True if least is None else lost < least
        best = scales if least is None else jnp.where(better, scales, best)
        least = lost if least is None else jnp.where(better, lost, least)
    return RoundedWeight(codes.encode(w, best), best)


def graded_gptq(w: jax.Array, statistics, *, name: str) -> RoundedWeight:
    """Rounds as the module describes; a ``Quantizer``."""
    if not hasattr(statistics, "moments"):
        return rtn(w, statistics, name=name)
    energies = level_energies(w, statistics)
    shares = jnp.asarray(energies / energies.sum(axis=1, keepdims=True), jnp.float32)
    scales = codes.max_abs_scales(w)
    hessian = statistics.moments + DAMPING * jnp.mean(jnp.diagonal(statistics.moments)) * jnp.eye(len(w))
    inverse = jnp.linalg.inv(hessian)
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    return RoundedWeight(_compensated(w, scales, upper, shares), scales)


@jax.jit
def _compensated(w, scales, upper, shares):
    """Returns 8-bit codes ``[K, N]``; each channel compensates for the errors of earlier ones."""

    def step(i, state):
        w, chosen = state
        scale = scales[i // layout.GROUP].astype(jnp.float32)
        ratio = jnp.where(scale > 0, w[i] / jnp.where(scale > 0, scale, 1), 0)
        code = jnp.clip(jnp.floor((ratio + codes.RANGE) * codes.CODE_STEPS), 0, 255).astype(jnp.int32)
        read, mean = jnp.zeros_like(ratio), jnp.zeros_like(ratio)
        for f in range(LEVELS):
            read += (((code >> (6 - 2 * f)) & 3) - codes.DIGIT_MEAN) * 4.0**-f
            mean += shares[i, f + 1] * read * scale
        later = jnp.where(jnp.arange(len(w)) > i, upper[i], 0) / upper[i, i]
        return w - later[:, None] * (w[i] - mean), chosen.at[i].set(code.astype(jnp.uint8))

    return jax.lax.fori_loop(0, len(w), step, (w, jnp.zeros(w.shape, jnp.uint8)))[1]


ROUNDINGS = {
    "rtn": Trial("the product, no refit, gains fitted", PLAIN_WEIGHTS),
    "scale-search": Trial(
        "scale search, weighted", PLAIN_WEIGHTS, rounded_by(partial(scale_search, weighted=True))
    ),
    "scale-search-plain": Trial(
        "scale search, unweighted", PLAIN_WEIGHTS, rounded_by(partial(scale_search, weighted=False))
    ),
    "graded-gptq": Trial("GPTQ by the mean error of the levels", PLAIN_WEIGHTS, rounded_by(graded_gptq)),
}
