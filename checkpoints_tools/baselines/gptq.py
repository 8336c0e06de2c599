"""GPTQ (Frantar et al., arXiv 2210.17323): rounds input channels in turn, and later ones absorb each error.

With the Hessian ``H = E[x x^T]`` of a layer's inputs, rounding input channel ``i`` to ``q_i`` costs least
when the later channels ``F`` move by ``-(w_i - q_i) / [H_FF^-1]_ii * [H_FF^-1]_F,i``. The rows of the upper
Cholesky factor ``U`` of ``H^-1 = U^T U`` hold these columns divided by ``sqrt([H_FF^-1]_ii)``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_tools.baselines import groups
from checkpoints_tools.baselines.groups import GROUP, Grid


@partial(jax.jit, static_argnames=("bits", "act_order"))
def gptq(
    w: Float[Array, "k n"],
    hessian: Float[Array, "k k"],
    bits: int,
    *,
    damping: float | Float[Array, ""] = 0.01,
    act_order: bool = False,
) -> Float[Array, "k n"]:
    """Returns the dequantized weights after GPTQ with groups of 128 channels.

    Args:
      w: Weights ``[in, out]``.
      hessian: ``E[x x^T]``. Channels that are always 0 get weights of 0.
      bits: Bits of the integers.
      damping: Share of the mean of the diagonal that is added to the diagonal.
      act_order: Round the channels with the largest energy first. A group is then 128 channels in that order.
    """
    k, n = w.shape
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    dead = jnp.diagonal(hessian) == 0
    w = jnp.where(dead[:, None], 0, w)
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    order = jnp.argsort(-jnp.diagonal(hessian)) if act_order else jnp.arange(k)
    hessian = hessian[order][:, order]
    hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(k)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), jnp.eye(k))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    padded = -k % GROUP
    w = jnp.pad(w[order], ((0, padded), (0, 0)))
    upper = jnp.pad(upper, ((0, padded), (0, padded)))

    def step(i, state):
        w, grid = state
        start = i // GROUP * GROUP
        grid = jax.lax.cond(
            i == start,
            lambda: groups.fit(jax.lax.dynamic_slice_in_dim(w, start, GROUP), bits),
            lambda: grid,
        )
        rounded = groups.round_to(w[i], grid, bits)
        error = (w[i] - rounded) / upper[i, i]
        behind = jnp.where(jnp.arange(len(w)) > i, upper[i], 0)
        return (w - behind[:, None] * error).at[i].set(rounded), grid

    start = Grid(jnp.ones(n), jnp.zeros(n))
    w, _ = jax.lax.fori_loop(0, k, step, (w, start))
    return jnp.zeros((k, n)).at[order].set(w[:k])
