"""AWQ (Lin et al., arXiv 2306.00978): input channels scaled by their activations, then ranges clipped.

``x @ W = (x / s) @ (diag(s) W)``: important channels are scaled up before rounding, so they keep more of
their precision; the operation before the layer absorbs ``1 / s``. The scales are ``s = (mean |x|) ** alpha``,
with the ``alpha`` of a grid that gives the least output error. Then the range of each group is shrunk by the
factor that gives the least output error of the group. Both errors are ``tr(D^T H D)``, where ``D`` is the
error of the weights and ``H = E[x x^T]``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.baselines import groups
from checkpoints_tools.baselines.groups import GROUP, Grid

ALPHAS = tuple(np.arange(20) / 20)
"""Exponents that are tried."""

SHRINKS = tuple(1 - np.arange(10) / 20)
"""Factors of a group's range that are tried."""


def output_error(error: Float[Array, "k n"], hessian: Float[Array, "k k"]) -> Float[Array, ""]:
    """Returns the mean squared output error that an error of the weights causes, summed over the outputs."""
    return jnp.sum(error * jnp.matmul(hessian, error, precision="highest"))


def channel_scales(magnitude: Float[Array, "k"], alpha: float | Float[Array, ""]) -> Float[Array, "k"]:
    """Returns ``magnitude ** alpha``, normalized so that its smallest times its largest value is 1.

    Channels that are always 0 count as 1.
    """
    powered = jnp.where(magnitude > 0, magnitude, 1) ** alpha
    return powered / jnp.sqrt(powered.max() * powered.min())


@partial(jax.jit, static_argnames="bits")
def awq(
    w: Float[Array, "k n"], hessian: Float[Array, "k k"], magnitude: Float[Array, "k"], bits: int
) -> Float[Array, "k n"]:
    """Returns the effective weights after AWQ: ``diag(1 / s) round(diag(s) W)``.

    Args:
      w: Weights ``[in, out]``.
      hessian: ``E[x x^T]``.
      magnitude: ``E[|x|]`` of each channel.
      bits: Bits of the integers.
    """
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)

    def attempt(alpha):
        s = channel_scales(magnitude, alpha)[:, None]
        return output_error(groups.rtn(w * s, bits) / s - w, hessian)

    alphas = jnp.asarray(ALPHAS, jnp.float32)
    s = channel_scales(magnitude, alphas[jnp.argmin(jax.lax.map(attempt, alphas))])
    return _clipped(w * s[:, None], hessian / s / s[:, None], bits) / s[:, None]


def _clipped(w: Float[Array, "k n"], hessian: Float[Array, "k k"], bits: int) -> Float[Array, "k n"]:
    """Rounds weights with the range of each group and output shrunk by the best of ``SHRINKS``."""
    k, n = w.shape
    padded = -k % GROUP
    hessian = jnp.pad(hessian, ((0, padded), (0, padded)))
    blocks = hessian.reshape(-1, GROUP, len(hessian) // GROUP, GROUP)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)

    def group(args):
        w, hessian = args

        def attempt(shrink):
            rounded = groups.round_to(w, groups.fit(w, bits, shrink), bits)
            error = rounded - w
            return jnp.sum(error * jnp.matmul(hessian, error, precision="highest"), axis=0)

        shrinks = jnp.asarray(SHRINKS, jnp.float32)
        best = shrinks[jnp.argmin(jax.lax.map(attempt, shrinks), axis=0)]
        return groups.round_to(w, Grid(*groups.fit(w, bits, best)), bits)

    return jax.lax.map(group, (groups.grouped(w), blocks)).reshape(-1, n)[:k]
