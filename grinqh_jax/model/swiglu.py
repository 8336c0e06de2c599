"""The activation function of the MLP."""

import jax
import jax.numpy as jnp

from pallas_kernels import Activations, decode_rows


@jax.named_scope("mlp")
def swiglu(gate_up: Activations) -> Activations:
    """Returns ``silu(gate) * up`` (arXiv 2002.05202), in one kernel for a decode step on a GPU.

    Args:
      gate_up: Outputs of the gate projection, then those of the up projection, ``[..., 2 n]``.
    """
    if decode_rows.supports(gate_up) is None:
        return decode_rows.swiglu(gate_up)
    gate, up = jnp.split(gate_up.array, 2, axis=-1)
    return Activations.of(jax.nn.silu(gate) * up)
