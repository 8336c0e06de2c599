"""How a decoder's linear layers are applied: a strategy object, called with each layer's name.

One decoder thus serves prefill (``Dense``), decoding (``Graded``) and whatever wants to see the
inputs, such as calibration: any callable ``apply(name, linear, x [..., K]) -> y [..., N]`` will do.
A strategy may collect what it saw during the call, traced values included, for its caller to read.
"""

from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from grinqh_jax.linear import GradedLinear, Linear

HEAD = "lm_head"
"""Name of the output projection; its result is float32 whatever the compute dtype."""


class Apply(Protocol):
    """Applies the linear layer called ``name`` to ``x``."""

    def __call__(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]: ...


class Dense:
    """Every layer at full precision (all planes of a graded one)."""

    def __call__(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        return linear.dense(x, jnp.float32 if name == HEAD else None)


class Graded:
    """Every layer graded by its input.

    Attributes:
      thresholds: by layer name, float32 ``[P]``, or ``[B, P]`` for a set per row of the batch.
      bits: by layer name, realised mean bits of every row, float32 of shape ``x.shape[:-1]``.
      saturation: by layer name, ``max |x| / max_activation`` of every row, likewise; above 1 the
        activations leave the range that calibration saw.
    """

    def __init__(self, thresholds: Mapping[str, Float[Array, "*b p"]]):
        self.thresholds = thresholds
        self.bits: dict[str, Float[Array, "*rows"]] = {}
        self.saturation: dict[str, Float[Array, "*rows"]] = {}

    def __call__(
        self, name: str, linear: GradedLinear, x: Float[Array, "*rows k"]
    ) -> Float[Array, "*rows n"]:
        rows = x.shape[:-1]
        thresholds = self.thresholds[name]
        if thresholds.ndim == 2:  # [B, P]: a batch row's positions share its thresholds
            thresholds = thresholds.reshape(-1, *(1,) * (len(rows) - 1), thresholds.shape[-1])
        planes = thresholds.shape[-1]
        thresholds = jnp.broadcast_to(thresholds, (*rows, planes)).reshape(-1, planes)
        y, bits = linear.graded(x.reshape(-1, x.shape[-1]), thresholds)
        self.bits[name] = bits.reshape(rows)
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
        self.saturation[name] = largest / linear.max_activation[...]
        return y.reshape(*rows, -1).astype(jnp.float32 if name == HEAD else x.dtype)
