"""The activation of the MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import Activations, PartialSums, decode_rows


@jax.named_scope("mlp")
def swiglu(
    gate_up: Float[Array, "*rows two_n"] | PartialSums,
) -> Float[Array, "*rows n"] | Activations:
    """``silu(gate) * up`` of the gate's outputs and then up's (arXiv 2002.05202).

    In a decode step on a GPU one kernel, which sums the product's parts too.
    """
    if isinstance(gate_up, PartialSums):
        return decode_rows.swiglu(gate_up)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
