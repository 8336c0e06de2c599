"""Nested codes: quantize, pack, unpack, dequantize. The formulas are in ``weight.NestedWeight``."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, UInt8, UInt32

from pallas_kernels import layout
from pallas_kernels.weight import NestedWeight, num_planes

RANGE = 2.0
"""A code spans ``[-2, 2)`` times its scale."""

CODE_STEPS = 64
"""Steps of the 8-bit code per unit of scale: ``code = (w / scale + 2) * 64``."""


def quantize(w: Float[Array, "k n"], *, max_bits: int = 8, name: str = "weight") -> NestedWeight:
    """Rounds ``w`` to nested codes with symmetric max-abs scales per (slice, output).

    Args:
      w: ``W[in_features, out_features]`` of ``y = x @ W`` (Hugging Face stores the transpose).
      max_bits: 2, 4, 6 or 8; trailing planes are not stored.
      name: what an error calls the tensor.

    Raises:
      ValueError: ``w`` is not a matrix, is empty, holds NaN or Inf, or values whose scale (half the
        group's largest magnitude) does not fit float16; ``max_bits`` is not 2, 4, 6 or 8.
    """
    num_planes(max_bits)
    check_quantizable(w, name)
    scales = max_abs_scales(w)
    return from_codes(encode(w, scales), scales, max_bits=max_bits)


def check_quantizable(w: Float[Array, "..."], name: str) -> None:
    """Raises ValueError naming ``name`` if ``w`` cannot be quantized (see ``quantize``)."""
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{name}: shape {tuple(w.shape)}, expected a non-empty matrix [in, out]")
    bad = int(jnp.sum(~jnp.isfinite(w)))
    if bad:
        raise ValueError(
            f"{name}: {bad} of {w.size} values are NaN or Inf; a quantizer cannot represent them"
        )
    largest = float(jnp.max(jnp.abs(w.astype(jnp.float32))))
    limit = RANGE * float(jnp.finfo(jnp.float16).max)
    if largest > limit:
        raise ValueError(
            f"{name}: largest magnitude {largest:g} exceeds {limit:g}, the range of float16 scales"
        )


@jax.jit
def max_abs_scales(w: Float[Array, "k n"]) -> Float16[Array, "s n"]:
    """``max |w| / 2`` over each slice of 128 input channels, rounded to float16 (unpadded N)."""
    k, n = w.shape
    w = jnp.pad(jnp.abs(w.astype(jnp.float32)), ((0, layout.round_up(k, layout.SLICE) - k), (0, 0)))
    return (w.reshape(-1, layout.SLICE, n).max(axis=1) / RANGE).astype(jnp.float16)


@jax.jit
def encode(w: Float[Array, "k n"], scales: Float16[Array, "s n"]) -> UInt8[Array, "k n"]:
    """The 8-bit code whose interval holds ``w / scale``: ``floor((w / scale + 2) * 64)``, clipped."""
    scale = jnp.repeat(scales.astype(jnp.float32), layout.SLICE, axis=0)[: w.shape[0]]
    ratio = jnp.where(scale > 0, w.astype(jnp.float32) / jnp.where(scale > 0, scale, 1), 0)
    return jnp.clip(jnp.floor((ratio + RANGE) * CODE_STEPS), 0, 255).astype(jnp.uint8)


def from_codes(
    codes: UInt8[Array, "k n"], scales: Float16[Array, "s n"], *, max_bits: int = 8
) -> NestedWeight:
    """Packs 8-bit codes and their scales, padding K to the slice and N to the tile.

    Args:
      codes: one 8-bit code per weight; its leading ``max_bits`` bits are kept.
      scales: float16 per (slice, output), ``s = ceil(k / 128)``.
      max_bits: 2, 4, 6 or 8.
    """
    in_features, out_features = codes.shape
    k, n = layout.padded_shape(in_features, out_features)
    codes = jnp.pad(codes, ((0, k - in_features), (0, n - out_features)))
    scales = jnp.pad(scales, ((0, k // layout.SLICE - scales.shape[0]), (0, n - out_features)))
    return NestedWeight(pack(codes, num_planes(max_bits)), scales, in_features, out_features)


def pack(codes: UInt8[Array, "k n"], planes: int) -> UInt32[Array, "p k w"]:
    """Splits padded codes into digits and packs each plane, 16 digits to a word (order: ``layout``)."""
    return _pack(codes, planes)


@jax.jit(static_argnums=1)
def _pack(codes, planes):
    k, n = codes.shape
    stored = codes.reshape(k, n // layout.TILE, layout.TILE)[:, :, layout.TILE_OUTPUTS]
    stored = stored.reshape(k, n // layout.WORD_DIGITS, layout.WORD_DIGITS).astype(jnp.uint32)
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32) * layout.DIGIT_BITS
    digits = [(stored >> (6 - layout.DIGIT_BITS * f)) & 3 for f in range(planes)]
    return jnp.stack([jnp.sum(d << shifts, axis=-1, dtype=jnp.uint32) for d in digits])


def unpack(planes: UInt32[Array, "p k w"]) -> UInt8[Array, "p k n"]:
    """The digits ``0..3`` of every plane, outputs in logical order: the inverse of ``pack``."""
    p, k, words = planes.shape
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32) * layout.DIGIT_BITS
    digits = ((planes[..., None] >> shifts) & 3).astype(jnp.uint8)
    digits = digits.reshape(p, k, words // layout.TILE_WORDS, layout.TILE)[..., layout.TILE_POSITIONS]
    return digits.reshape(p, k, words * layout.WORD_DIGITS)


def midpoint(level: Int[Array, "..."] | int) -> Float[Array, "..."]:
    """``0.5 * 4**(1 - l) - 2`` for ``l >= 1``, and 0 for level 0: what a level adds to its digits."""
    level = jnp.asarray(level)
    return jnp.where(level > 0, 2.0 * 4.0 ** -level.astype(jnp.float32) - RANGE, 0.0)


def dequantize(
    weight: NestedWeight, level: Int[Array, "k"] | int | None = None, dtype=jnp.float32
) -> Float[Array, "k n"]:
    """``w_l`` of every weight, ``[in_features, out_features]``, computed in float32, cast to ``dtype``.

    Args:
      weight: the nested weight.
      level: one level for all input channels, or one per channel (int ``[in_features]``); the highest
        stored level by default. A level above the stored planes reads what is stored.
      dtype: of the result.
    """
    planes, scales = weight.planes, weight.scales
    if level is None:
        level = weight.num_planes
    if isinstance(level, int):
        planes = planes[: min(level, weight.num_planes)]
    level = jnp.minimum(jnp.broadcast_to(jnp.asarray(level), (weight.in_features,)), weight.num_planes)
    digits = unpack(planes)[:, : weight.in_features]
    place = jnp.asarray(4.0 ** -np.arange(len(digits)), jnp.float32)
    read = jnp.arange(len(digits))[:, None] < level
    total = jnp.sum(digits * (place[:, None] * read)[..., None], axis=0) + midpoint(level)[:, None]
    scale = jnp.repeat(scales.astype(jnp.float32), layout.SLICE, axis=0)[: weight.in_features]
    return (total * scale)[:, : weight.out_features].astype(dtype)


def level_errors(w: Float[Array, "k n"], weight: NestedWeight) -> Float[Array, "p1"]:
    """``e(l)``, the mean squared weight error of levels ``0..P`` (``e(0)`` = mean square of ``w``)."""
    w = w.astype(jnp.float32)
    return jnp.stack([jnp.mean((w - dequantize(weight, l)) ** 2) for l in range(weight.num_planes + 1)])
