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
      codes: 8-bit codes ``[K, N]``.
      scales: Scales ``[ceil(K / 128), N]``, finite, at least 0.
    """

    codes: UInt8[Array, "k n"]
    scales: Float16[Array, "s n"]


class LevelFit(NamedTuple):
    """Fit of the levels to a weight: means over its entries, each weighted by its output's sensitivity.

    Attributes:
      errors: ``(w - w_l)**2`` of levels ``0..P``, ``[P + 1]``. Level 0 is the mean square of ``w``.
      slopes: ``w_l (w - w_l)`` of levels ``1..P``, ``[P]``; positive where ``w_l`` is too small.
      squares: ``w_l**2`` of levels ``1..P``, ``[P]``.
    """

    errors: Float[Array, "p1"]
    slopes: Float[Array, "p"]
    squares: Float[Array, "p"]


@partial(jax.jit, static_argnames="num_planes")
def level_fit(
    w: Float[Array, "k n"], rounded: RoundedWeight, sensitivities: Float[Array, "n"], *, num_planes: int
) -> LevelFit:
    """Compares a weight with each level of its codes, all level gains 1, without packing them.

    Args:
      w: Weight.
      rounded: Its codes and scales.
      sensitivities: Weight of each output in the means.
      num_planes: Number of planes ``P`` that will be stored.
    """
    w = w.astype(jnp.float32)
    scale = jnp.repeat(rounded.scales.astype(jnp.float32), layout.GROUP, axis=0)[: w.shape[0]]
    digits_read = jnp.zeros(w.shape, jnp.float32)
    means = []
    for level in range(num_planes + 1):
        if level:
            digit = (rounded.codes >> (8 - layout.DIGIT_BITS * level)) & 3
            digits_read += (digit.astype(jnp.float32) - codes.DIGIT_MEAN) * 4.0 ** (1 - level)
        read = digits_read * scale
        error = w - read
        means.append([jnp.mean(product * sensitivities) for product in (error**2, read * error, read**2)])
    errors, slopes, squares = (jnp.stack(column) for column in zip(*means, strict=True))
    return LevelFit(errors, slopes[1:], squares[1:])
