"""A streaming histogram of activation magnitudes: bounded memory for any amount of text.

A bin holds the magnitudes whose float32 patterns agree in their upper 16 bits, which round down to the same
bfloat16 number. The bins are logarithmic, 128 for each octave, and cover the range of float32, so their edges
do not depend on the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Integer

BINS = 1 << 15

FINITE_BINS = 0x7F80
"""Number of bins for finite values. The bins above hold Inf and NaN."""

_SHIFT = 16


@jax.jit
def count(x: Float[Array, "*rows k"], is_counted: Bool[Array, "*rows"] | None = None) -> Int32[Array, "bins"]:
    """Counts the values of ``|x|`` in each bin, of all rows or of some. ``x`` has fewer than ``2**31``."""
    pattern = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)
    bins = pattern >> _SHIFT
    if is_counted is not None:
        bins = jnp.where(is_counted[..., None], bins, BINS)
    return jnp.zeros(BINS, jnp.int32).at[bins.reshape(-1)].add(1, mode="drop")


def mean_square(counts: Integer[np.ndarray, "bins"]) -> float:
    """Returns the mean of ``x**2`` over the finite values, within 1 %; 0 if there are none."""
    finite = np.asarray(counts[:FINITE_BINS], np.float64)
    middles = (np.arange(FINITE_BINS, dtype=np.uint32) << _SHIFT) + (1 << (_SHIFT - 1))
    middles[0] = 0  # The first bin holds zeros and negligible values.
    squares = middles.view(np.float32).astype(np.float64) ** 2
    return float(finite @ squares / max(finite.sum(), 1))


def share_reaching(
    counts: Integer[np.ndarray, "bins"], thresholds: Float[np.ndarray, "*any"] | np.floating
) -> Float[np.ndarray, "*any"] | np.floating:
    """Returns the share of the counted magnitudes that are at least as large as each threshold.

    Magnitudes are assumed to be spread evenly inside a bin, so the share is continuous in the threshold. Its
    error is less than the share of values in one bin, which is at most about 0.3 % for the activations of a
    layer.

    Args:
      counts: Number of values in each bin; not all zero.
      thresholds: Finite and not negative.
    """
    reaching = np.append(np.cumsum(counts[::-1], dtype=np.float64)[::-1], 0.0)
    pattern = np.asarray(thresholds, np.float32).view(np.uint32)
    index, inside = pattern >> _SHIFT, (pattern & 0xFFFF) / 2.0**_SHIFT
    return ((1 - inside) * reaching[index] + inside * reaching[index + 1]) / reaching[0]
