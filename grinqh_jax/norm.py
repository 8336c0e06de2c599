"""Root mean square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rows d"], scale: Float[Array, "*heads d"], eps: float
) -> Float[Array, "*rows d"]:
    """``x / sqrt(mean(x**2) + eps) * scale`` over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)
