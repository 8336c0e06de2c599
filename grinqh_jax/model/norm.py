"""Root mean square normalization, and the residual addition before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grinqh_jax.model.by_token import by_token
from pallas_kernels import Activations, decode_rows
from pallas_kernels.exchange import UnexchangedSums


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rows d"],
    norm_scale: Float[Array, "*heads d"],
    eps: float,
    across: str | None = None,
) -> Float[Array, "*rows d"]:
    """Returns ``x / sqrt(mean(x**2) + eps) * norm_scale`` over the last axis, computed in float32.

    Source: arXiv 1910.07467.

    Args:
      x: Values to normalize.
      norm_scale: Learned scale of the norm.
      eps: Epsilon of the norm.
      across: Mesh axis among whose devices the last axis is cut evenly; None if it is whole.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    if across is not None:
        mean_square = jax.lax.pmean(mean_square, across)
    wide = wide * jax.lax.rsqrt(mean_square + eps)
    return (wide * norm_scale.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("norm")
def add_norm(
    x: Float[Array, "b t d"],
    update: Activations | UnexchangedSums | None,
    norm_scale: Float[Array, "d"],
    eps: float,
) -> tuple[Float[Array, "b t d"], Activations]:
    """Returns ``(x + update, rms_norm(x + update))``, in one kernel for a decode step on a GPU.

    Args:
      x: Residual stream.
      update: Outputs ``[b, t, d]`` of the projection that writes to the stream; None before the first one.
      norm_scale: Learned scale of the norm.
      eps: Epsilon of the norm.
    """
    if isinstance(update, UnexchangedSums):
        if (added := update.add_norm(x, norm_scale, eps)) is not None:
            return added
        update = update.exchanged()
    # The first norm of a step takes the kernel, too: XLA's sum over a row may depend on the other rows.
    sums = _zeros(x) if update is None else update
    if decode_rows.supports(sums) is None:
        return decode_rows.add_norm(x, sums, norm_scale, eps)
    total = x if update is None else x + update.array
    return total, Activations.of(by_token(lambda total: rms_norm(total, norm_scale, eps), total))


def _zeros(x: Float[Array, "b t d"]) -> Activations:
    """Returns a partial sum that changes nothing."""
    return Activations.sums(jnp.zeros((1, *x.shape), jnp.float32), x.shape[-1]).astype(x.dtype)
