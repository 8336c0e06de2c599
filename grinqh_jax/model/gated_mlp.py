"""The activation function of a gated MLP."""

import jax
import jax.numpy as jnp

from grinqh_jax.model.layer_spec import Activation
from pallas_kernels import Activations, decode_rows


@jax.named_scope("mlp")
def gated(gate_up: Activations, activation: Activation = "silu") -> Activations:
    """Returns ``activation(gate) * up`` (arXiv 2002.05202).

    With SiLU this is one kernel of a decode step on a GPU.

    Args:
      gate_up: Outputs of the gate projection, then those of the up projection, ``[..., 2 n]``.
      activation: Activation function of the gate.
    """
    if activation == "silu" and decode_rows.supports(gate_up) is None:
        return decode_rows.swiglu(gate_up)
    gate, up = jnp.split(gate_up.array, 2, axis=-1)
    activated = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return Activations.of(activated * up)
