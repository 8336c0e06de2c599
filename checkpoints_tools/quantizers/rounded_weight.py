"""A rounded weight before it is packed into planes, and how well each of its levels fits the original."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from pallas_kernels import codes, layout


class RoundedWeight(NamedTuple):
    """A quantizer's result; ``pallas_kernels.from_codes`` packs it.

    Attributes:
      codes: 8-bit codes, uint8 ``[K, N]``.
      scales: float16 ``[ceil(K / 128), N]``, finite, at least 0.
    """

    codes: UInt8[Array, "k n"]
    scales: Float16[Array, "s n"]


class LevelFit(NamedTuple):
    """Fit of the levels to a weight: means over its entries, each weighted by its output's sensitivity.

    Attributes:
      errors: Means of ``(w - w_l)**2`` for levels ``0..P``, ``[P + 1]``; at level 0, of ``w**2``.
      slopes: Means of ``w_l (w - w_l)`` for levels ``1..P``, ``[P]``; positive where ``w_l`` is too small.
      squares: Means of ``w_l**2`` for levels ``1..P``, ``[P]``.
    """

    errors: Float[Array, "p1"]
    slopes: Float[Array, "p"]
    squares: Float[Array, "p"]


@partial(jax.jit, static_argnames="num_planes")
def level_fit(
    w: Float[Array, "k n"], rounded: RoundedWeight, sensitivities: Float[Array, "n"], *, num_planes: int
) -> LevelFit:
    """Compares a weight with each level of its codes, before these are packed; all level gains are 1.

    Args:
      w: Weight.
      rounded: Its codes and scales.
      sensitivities: Sensitivity of each output, its weight in the means.
      num_planes: Number of planes ``P`` that will be stored.
    """
    w = w.astype(jnp.float32)
    scale = jnp.repeat(rounded.scales.astype(jnp.float32), layout.GROUP, axis=0)[: w.shape[0]]
    digit_sums = jnp.zeros(w.shape, jnp.float32)
    means = []
    for level in range(num_planes + 1):
        if level:
            digit = (rounded.codes >> (8 - layout.DIGIT_BITS * level)) & 3
            digit_sums += (digit.astype(jnp.float32) - codes.DIGIT_MEAN) * 4.0 ** (1 - level)
        level_weight = digit_sums * scale
        error = w - level_weight
        products = error**2, level_weight * error, level_weight**2
        means.append([jnp.mean(product * sensitivities) for product in products])
    errors, slopes, squares = (jnp.stack(column) for column in zip(*means, strict=True))
    return LevelFit(errors, slopes[1:], squares[1:])
