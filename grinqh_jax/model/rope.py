"""Rotary position embedding and its scalings for long contexts.

Sources: RoFormer (arXiv 2104.09864); for the types, arXiv 2306.15595 (``linear``), Llama 3.1's reference code
(``llama3``), arXiv 2309.00071 (``yarn``) and arXiv 2402.13753 (``longrope``). As in Hugging Face's
checkpoints, channel i of the first half of a head is rotated together with channel i of the second half.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

DEFAULT_ROPE_THETA = 10000.0
"""Base of the rotary frequencies if a configuration names none, for most families."""

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a layer.

    Attributes:
      theta: Base of the frequencies.
      type: Scaling of the frequencies (see ``inverse_frequencies``).
      rotary_dim: Number of leading channels of a head that are rotated; None for all.
      factor: Factor by which ``linear``, ``llama3`` and ``yarn`` stretch wavelengths.
      low_freq_factor, high_freq_factor: Only for ``llama3``.
      original_max_position_embeddings: Context before the scaling; only for ``llama3``, ``yarn`` and
        ``longrope``.
      beta_fast, beta_slow: Turns in the original context above and below which ``yarn`` keeps and stretches.
      truncate: Whether ``yarn`` rounds the channels between which it blends.
      channel_factors: Factor of each wavelength; only for ``longrope``.
      long_channel_factors: The same in texts of more than ``original_max_position_embeddings`` tokens.
      attention_factor: Factor of cosine and sine.
    """

    theta: float = DEFAULT_ROPE_THETA
    type: RopeType = "default"
    rotary_dim: int | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    channel_factors: tuple[float, ...] = ()
    long_channel_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


def inverse_frequencies(rope: RopeConfig, head_dim: int, tokens: int = 0) -> np.ndarray:
    """Returns float32 ``[rotary_dim / 2]`` radians per position: ``theta ** (-2 i / rotary_dim)``, scaled.

    ``tokens`` is the length of the text if it is read as a whole. A text that is read into a cache keeps the
    frequencies of its first tokens, so that it must not have more than ``original_max_position_embeddings``.

    * ``linear`` stretches all wavelengths by ``factor``.
    * ``llama3`` stretches wavelengths above ``original / low_freq_factor`` positions, keeps those below
      ``original / high_freq_factor``, and blends the two in between, where ``original`` is
      ``original_max_position_embeddings``.
    * ``yarn`` keeps wavelengths that turn ``beta_fast`` times or more in ``original`` positions, stretches
      those that turn ``beta_slow`` times or less, and blends the two in between, linearly in the channel.
    * ``longrope`` stretches each wavelength by its ``channel_factors``, or in long texts by its
      ``long_channel_factors``.
    """
    dim = rope.rotary_dim or head_dim
    frequency = rope.theta ** (-np.arange(0, dim, 2) / dim)
    match rope.type:
        case "linear":
            frequency = frequency / rope.factor
        case "llama3":
            turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
            keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            frequency = _blend(frequency, rope.factor, keep)
        case "yarn":
            low, high = (_channel_of_turns(rope, turns, dim) for turns in (rope.beta_fast, rope.beta_slow))
            if rope.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            high = low + 0.001 if low == high else high
            frequency = _blend(frequency, rope.factor, 1 - (np.arange(dim // 2) - low) / (high - low))
        case "longrope":
            is_long = tokens > rope.original_max_position_embeddings
            frequency = frequency / np.asarray(rope.long_channel_factors if is_long else rope.channel_factors)
    return frequency.astype(np.float32)


def _blend(frequency: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """Keeps the share ``keep``, cut to 0 to 1, of each frequency and divides the rest by ``factor``."""
    keep = np.clip(keep, 0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def _channel_of_turns(rope: RopeConfig, turns: float, dim: int) -> float:
    """Returns the channel, a real number, that turns this many times in the original context."""
    wavelength = rope.original_max_position_embeddings / (2 * np.pi * turns)
    return dim * math.log(wavelength) / (2 * math.log(rope.theta))


def cos_sin(
    positions: Int[Array, "*rows"], frequencies: Float[Array | np.ndarray, "half"], scale: float = 1.0
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """Returns the float32 cosine and sine of every angle ``position * frequency``, times ``scale``."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


@jax.named_scope("attention")
def rotate(
    x: Float[Array, "b t heads d"],
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
    scale: float = 1.0,
) -> Float[Array, "b t heads d"]:
    """Rotates the leading channels of every head, in float32, and returns the dtype of x.

    Args:
      x: Heads. Channels ``0 .. half`` are rotated against channels ``half .. 2 half``.
      cos, sin: Cosine and sine of the rotation angles.
      scale: Factor of the channels that are not rotated.
    """
    wide, half = x.astype(jnp.float32), cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second, rest = jnp.split(wide, (half, 2 * half), axis=-1)
    rest = rest if scale == 1 else rest * scale
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)
