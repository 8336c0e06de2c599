"""The dial: from mean bits to thresholds, by interpolation in each layer's calibrated table."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grinqh_jax.decoder import Decoder, linear_names


def interpolate(
    table: Float[Array, "t p"], targets: Sequence[float] | Float[Array, "t"], bits: Float[Array, "*b"]
) -> Float[Array, "*b p"]:
    """Thresholds for a mean of ``bits``: linear between the two nearest targets, clamped at the ends.

    Thresholds stay ascending along P, as means of ascending ones. Nothing here depends on the value
    of ``bits``, so it may be traced.

    Args:
      table: thresholds at each target.
      targets: mean bits of the table's rows, ascending.
      bits: wanted mean bits, a scalar or one per row of a batch.
    """
    targets = jnp.asarray(targets, jnp.float32)
    bits = jnp.asarray(bits, jnp.float32)
    return jax.vmap(jnp.interp, in_axes=(None, None, 1), out_axes=-1)(bits, targets, table)


@jax.jit
def model_thresholds(
    model: Decoder, targets: Float[Array, "t"], bits: Float[Array, "*b"]
) -> dict[str, Float[Array, "*b p"]]:
    """Thresholds of every linear layer of a graded model, by name (see ``interpolate``)."""
    return {
        name: interpolate(model.linear(name).thresholds[...], targets, bits)
        for name in linear_names(model.config)
    }
