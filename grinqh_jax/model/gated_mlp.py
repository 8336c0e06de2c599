"""The activation function of a gated MLP, and of the experts of a mixture."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grinqh_jax.model.layer_spec import Activation, ClampedSwiGLU
from pallas_kernels import Activations, decode_rows
from pallas_kernels.router.grading_factor import grading_factor


@jax.named_scope("mlp")
def gated(gate_up: Activations, activation: Activation = "silu") -> Activations:
    """Returns ``activation(gate) * up`` (arXiv 2002.05202, and ``layer_spec.ClampedSwiGLU``).

    With SiLU this is one kernel of a decode step on a GPU.

    Args:
      gate_up: Outputs of the gate projection, then those of the up projection, ``[..., 2 n]``.
      activation: Activation of the MLP.
    """
    if activation == "silu" and decode_rows.supports(gate_up) is None:
        return decode_rows.swiglu(gate_up)
    return Activations.of(_gated(gate_up.array, activation))


def _gated(gate_up: Float[Array, "*rows n2"], activation: Activation) -> Float[Array, "*rows n"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if isinstance(activation, ClampedSwiGLU):
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
        return (up + 1) * gate * jax.nn.sigmoid(activation.alpha * gate)
    return _FUNCTIONS[activation](gate) * up


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@jax.named_scope("mlp")
def gated_experts(
    gate_up: Activations, probabilities: Float[Array, "*rows c"], activation: Activation = "silu"
) -> Activations:
    """Returns the inputs of the second projection of experts: ``probability * activation(gate) * up``.

    With SiLU and ``ClampedSwiGLU`` this is one kernel of a decode step on a GPU.

    Args:
      gate_up: Outputs of the experts' first projections ``[*rows, c, 2 n]``, times their grading factors.
      probabilities: Factors of the experts' results.
      activation: Activation of the experts.
    """
    has_kernel = activation == "silu" or isinstance(activation, ClampedSwiGLU)
    if has_kernel and decode_rows.supports_rows(gate_up) is None:
        clamp = None
        if isinstance(activation, ClampedSwiGLU):
            clamp = decode_rows.Clamp(activation.alpha, activation.limit)
        return decode_rows.swiglu_experts(gate_up, probabilities, clamp)
    factor = grading_factor(probabilities)[..., None].astype(gate_up.dtype)
    mixed = _gated(gate_up.array / factor, activation)
    return Activations.of((mixed * probabilities[..., None]).astype(gate_up.dtype))
