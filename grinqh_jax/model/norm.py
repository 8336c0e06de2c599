"""Root mean square normalisation, and the residual addition before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import Activations, PartialSums, decode_rows


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rows d"], scale: Float[Array, "*heads d"], eps: float
) -> Float[Array, "*rows d"]:
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("norm")
def add_norm(
    x: Float[Array, "b t d"],
    update: Float[Array, "b t d"] | PartialSums | None,
    scale: Float[Array, "d"],
    eps: float,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"] | Activations]:
    """``(x + update, rms_norm(x + update))``; in a decode step on a GPU one kernel.

    See ``pallas_kernels.activations``.
    """
    if isinstance(update, PartialSums):
        total, normed = decode_rows.add_norm(x[:, 0], update, scale, eps)
        return total[:, None], normed
    total = x if update is None else x + update
    return total, rms_norm(total, scale, eps)
