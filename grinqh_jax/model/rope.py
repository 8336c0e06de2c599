"""Rotary position embedding, plain and with Llama 3's scaling.

Sources: RoFormer (arXiv 2104.09864), and Llama 3.1's reference code for the scaling. As in Hugging Face's
checkpoints, channel i of the first half of a head is rotated together with channel i of the second half.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Returns float32 ``[head_dim / 2]`` radians per position: ``theta ** (-2 i / head_dim)``.

    The type ``llama3`` stretches wavelengths above ``original / low_freq_factor`` positions by ``factor``,
    keeps wavelengths below ``original / high_freq_factor``, and blends the two in between, where ``original``
    is ``original_max_position_embeddings``.
    """
    frequency = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope.factor
    return frequency.astype(np.float32)


def cos_sin(
    positions: Int[Array, "*rows"], frequencies: Float[Array | np.ndarray, "half"]
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """Returns the float32 cosine and sine of every angle ``position * frequency``, in radians."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


@jax.named_scope("attention")
def rotate(
    x: Float[Array, "b t heads d"],
    positions: Int[Array, "b t"],
    frequencies: Float[Array | np.ndarray, "half"],
) -> Float[Array, "b t heads d"]:
    """Rotates every head by its position, in float32, and returns the dtype of x."""
    cos, sin = (a[..., None, :] for a in cos_sin(positions, frequencies))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
