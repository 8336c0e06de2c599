"""Nested codes: quantize, pack, unpack, dequantize. The formulas are in ``weight.NestedWeight``."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Shaped, UInt8, UInt32

from pallas_kernels import grading, layout
from pallas_kernels.weight import NestedWeight, num_planes

RANGE = 2.0
"""A code spans ``[-2, 2)`` times its scale."""

CODE_STEPS = 64
"""Steps of the 8-bit code per unit of scale: ``code = (w / scale + 2) * 64``."""

DIGIT_MEAN = 1.5
"""Mean of the digits 0..3: a digit ``d`` of plane ``f`` adds ``(d - 1.5) * 4**-f`` times the scale."""


def quantize(w: Shaped[Array, "..."], *, max_bits: int = 8, name: str = "weight") -> NestedWeight:
    """Rounds ``w`` to nested codes with symmetric max-abs scales per (slice, output).

    Every level ``l >= 1`` of the result is within its half step of ``w``, up to float32 rounding:
    ``|w - w_l| <= scale * 0.5 * 4**(1 - l)``.

    Args:
      w: float ``W[in_features, out_features]`` of ``y = x @ W`` (Hugging Face stores the transpose);
        concrete, not traced.
      max_bits: 2, 4, 6 or 8; trailing planes are not stored.
      name: what an error calls the tensor.

    Raises:
      ValueError: as ``check_quantizable``; or ``max_bits`` is not 2, 4, 6 or 8.
    """
    num_planes(max_bits)
    check_quantizable(w, name)
    scales = max_abs_scales(w)
    return from_codes(encode(w, scales), scales, max_bits=max_bits)


def check_quantizable(w: Shaped[Array, "..."], name: str) -> None:
    """Raises ValueError naming ``name`` if ``w`` cannot be quantized.

    That is: it is not a matrix, is empty, is not of a float dtype, holds NaN or Inf, or holds values
    whose scale (half the largest magnitude of the group) does not fit float16.
    """
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{name}: shape {tuple(w.shape)}, expected a non-empty matrix [in, out]")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: dtype {w.dtype}, expected a float dtype")
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
    """``max |w| / 2`` over each slice of 128 input channels (N is not padded).

    Rounded *up* to float16: a scale rounded down would clip the group's largest weights, by a third
    where the scale is a subnormal float16.
    """
    k, n = w.shape
    w = jnp.pad(jnp.abs(w.astype(jnp.float32)), ((0, layout.round_up(k, layout.GROUP) - k), (0, 0)))
    half = w.reshape(-1, layout.GROUP, n).max(axis=1) / RANGE
    nearest = half.astype(jnp.float16)
    # The next float16 of a non-negative one is the next integer.
    up = jax.lax.bitcast_convert_type(nearest, jnp.uint16) + (nearest.astype(jnp.float32) < half)
    return jax.lax.bitcast_convert_type(up.astype(jnp.uint16), jnp.float16)


@jax.jit
def encode(w: Float[Array, "k n"], scales: Float16[Array, "s n"]) -> UInt8[Array, "k n"]:
    """The 8-bit code whose interval holds ``w / scale``: ``floor((w / scale + 2) * 64)``, clipped."""
    scale = jnp.repeat(scales.astype(jnp.float32), layout.GROUP, axis=0)[: w.shape[0]]
    ratio = jnp.where(scale > 0, w.astype(jnp.float32) / jnp.where(scale > 0, scale, 1), 0)
    return jnp.clip(jnp.floor((ratio + RANGE) * CODE_STEPS), 0, 255).astype(jnp.uint8)


def from_codes(
    codes: UInt8[Array, "k n"], scales: Float16[Array, "s n"], *, max_bits: int = 8
) -> NestedWeight:
    """Packs 8-bit codes and their scales, padding K to the slice and N to the tile. All gains are 1.

    Args:
      codes: one 8-bit code per weight; its leading ``max_bits`` bits are kept.
      scales: float16 per (slice, output), ``s = ceil(k / 128)``; finite, ``>= 0``.
      max_bits: 2, 4, 6 or 8.

    Raises:
      ValueError: ``max_bits`` is not 2, 4, 6 or 8, or the shapes do not fit each other.
    """
    planes = num_planes(max_bits)
    in_features, out_features = codes.shape
    k, n = layout.padded_shape(in_features, out_features)
    if scales.shape != (k // layout.GROUP, out_features):
        raise ValueError(
            f"scales has shape {scales.shape}, expected {(k // layout.GROUP, out_features)} "
            f"for codes of shape {codes.shape}"
        )
    codes = jnp.pad(codes, ((0, k - in_features), (0, n - out_features)))
    scales = jnp.pad(scales, ((0, 0), (0, n - out_features)))
    return NestedWeight(pack(codes, planes), scales, in_features, out_features, jnp.ones(planes))


@jax.jit(static_argnums=1)
def pack(codes: UInt8[Array, "k n"], planes: int) -> UInt32[Array, "p k w"]:
    """Splits padded codes into digits and packs each plane, 16 digits to a word (order: ``layout``)."""
    k, n = codes.shape
    stored = codes.reshape(k, n // layout.TILE, layout.TILE)[:, :, layout.TILE_OUTPUTS]
    stored = stored.reshape(k, n // layout.WORD_DIGITS, layout.WORD_DIGITS).astype(jnp.uint32)
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32) * layout.DIGIT_BITS
    digits = [(stored >> (6 - layout.DIGIT_BITS * f)) & 3 for f in range(planes)]
    return jnp.stack([jnp.sum(d << shifts, axis=-1, dtype=jnp.uint32) for d in digits])


def unpack_digit_major(words: UInt32[Array, "*any w"]) -> Int[Array, "*any 16 w"]:
    """The digits ``0..3`` of packed words, in the order of ``layout.digit_major_positions``."""
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32)[:, None] * layout.DIGIT_BITS
    return ((words[..., None, :] >> shifts) & 3).astype(jnp.int32)


def unpack(planes: UInt32[Array, "p k w"]) -> UInt8[Array, "p k n"]:
    """The digits ``0..3`` of every plane, outputs in logical order: the inverse of ``pack``."""
    return _logical_order(unpack_digit_major(planes).astype(jnp.uint8))


def _logical_order(digit_major):
    *any_, digits, words = digit_major.shape
    flat = digit_major.reshape(*any_, digits * words)
    return flat[..., layout.digit_major_positions(digits * words)]


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
    if level is None or isinstance(level, int):
        weight = dataclasses.replace(weight, planes=weight.planes[:level])
        level = weight.num_planes
    level = jnp.minimum(level, weight.num_planes)
    f = jnp.arange(weight.num_planes)[:, None]
    gain = grading.gain_of_each(level, weight.level_gains)
    return _dequantize(weight, jnp.where(f < level, gain * 4.0**-f, 0.0), dtype)


@jax.jit(static_argnums=2)
def _dequantize(weight, place, dtype):
    """``place [P, K or 1]``: what a digit of a plane is worth in a channel, 0 where it is not read."""
    planes = weight.planes[:, : weight.in_features]
    # Summed in the order of the words, so that the outputs are permuted once and not in every plane.
    total = jnp.zeros((planes.shape[1], layout.WORD_DIGITS, planes.shape[2]), jnp.float32)
    for words, worth in zip(planes, place, strict=True):
        total += (unpack_digit_major(words) - DIGIT_MEAN) * worth[:, None, None]
    scale = jnp.repeat(weight.scales.astype(jnp.float32), layout.GROUP, axis=0)[: weight.in_features]
    return (_logical_order(total) * scale)[:, : weight.out_features].astype(dtype)


class LevelFit(NamedTuple):
    """How the levels of a weight's codes fit it: means over its entries.

    Attributes:
      errors: ``e(l) = (w - w_l)**2``, ``[P + 1]``, of levels ``0..P`` (``e(0)`` = mean square of ``w``).
      slopes: ``w_l (w - w_l)``, ``[P]``, of levels ``1..P``: above 0 where ``w_l`` is too small.
      squares: ``w_l**2``, likewise.
    """

    errors: Float[Array, "p1"]
    slopes: Float[Array, "p"]
    squares: Float[Array, "p"]


def level_fit(
    w: Float[Array, "k n"], weight: NestedWeight, output_weights: Float[Array, "n"] | None = None
) -> LevelFit:
    """Of ``w`` and its codes. ``output_weights`` multiply what each output adds; all are 1 by default."""
    w = w.astype(jnp.float32)
    output_weights = 1.0 if output_weights is None else output_weights
    found = []
    for level in range(weight.num_planes + 1):
        read = dequantize(weight, level)
        error = w - read
        found.append([jnp.mean(product * output_weights) for product in (error**2, read * error, read**2)])
    errors, slopes, squares = (jnp.stack(column) for column in zip(*found, strict=True))
    return LevelFit(errors, slopes[1:], squares[1:])


def level_errors(w: Float[Array, "k n"], weight: NestedWeight) -> Float[Array, "p1"]:
    """``e(l)``, the mean squared weight error of levels ``0..P`` (``e(0)`` = mean square of ``w``)."""
    return level_fit(w, weight).errors
