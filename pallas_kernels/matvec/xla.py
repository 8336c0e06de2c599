"""The graded matvec in XLA operations: what a CPU, or a device without a kernel of its own, runs.

With ``x^(f)`` the activations of the channels whose level exceeds ``f`` (zero elsewhere), the
definition in ``NestedWeight`` regroups by plane:

    ``y = sum_s scales[s] * ( sum_f 4**-f * x_s^(f) @ d_f,s  +  sum_{k in s} x_k * midpoint(level_k) )``.

Digits are never permuted: the outputs are, once, after the sum over the channels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading, layout
from pallas_kernels.weight import NestedWeight


def supports(x, weight: NestedWeight) -> str | None:
    """Always None: XLA takes any rows on any device."""
    del x, weight
    return None


def graded_matvec(x: jax.Array, weight: NestedWeight, thresholds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See ``api.graded_matvec``; ``x [rows, K]``, ``thresholds [rows, P]``, any number of rows."""
    level = grading.levels(x, thresholds)
    bits = grading.realised_bits(level)
    x = x.astype(jnp.float32)
    padding = weight.planes.shape[1] - weight.in_features
    x, level = (jnp.pad(a, ((0, 0), (0, padding))) for a in (x, level))
    slices = weight.scales.shape[0]

    def by_slice(a):
        return a.reshape(a.shape[0], slices, layout.SLICE)

    offset = jnp.sum(by_slice(jnp.where(level > 0, x * codes.midpoint(level), 0)), axis=-1)
    partial = offset[:, :, None]
    for f, digits in enumerate(codes.unpack(weight.planes)):
        digits = digits.astype(jnp.float32).reshape(slices, layout.SLICE, -1)
        read = by_slice(jnp.where(level > f, x, 0) * 4.0**-f)
        partial = partial + jnp.einsum("rsk,skn->rsn", read, digits, precision=jax.lax.Precision.HIGHEST)
    y = jnp.einsum("rsn,sn->rn", partial, weight.scales.astype(jnp.float32))
    return y[:, : weight.out_features], bits
