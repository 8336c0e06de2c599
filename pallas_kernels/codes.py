"""Nested codes: quantize, pack, unpack and dequantize. The formulas are in ``weight.NestedWeight``."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Shaped, UInt8, UInt32

from pallas_kernels import grading, layout
from pallas_kernels.weight import NestedWeight, num_planes
from pallas_kernels.x64 import without_x64

RANGE = 2.0
"""A code spans ``[-RANGE, RANGE)`` times its scale."""

CODE_STEPS = 64
"""Number of 8-bit codes in a range of one scale: ``code = (w / scale + 2) * 64``."""

DIGIT_MEAN = 1.5
"""Mean of the digits 0 to 3. A digit ``d`` of plane ``f`` adds ``(d - 1.5) * 4**-f`` times the scale."""


@without_x64
def quantize(w: Shaped[Array, "..."], *, max_bits: int = 8, name: str = "weight") -> NestedWeight:
    """Rounds ``w`` to nested codes, with a symmetric max-abs scale for each (group, output).

    Every level ``l >= 1`` of the result is within its half step of ``w``, up to float32 rounding:
    ``|w - w_l| <= scale * 0.5 * 4**(1 - l)``.

    Args:
      w: ``W[in_features, out_features]`` of ``y = x @ W``, of a float dtype, not traced. (Hugging Face stores
        the transpose.)
      max_bits: Bits of the stored code: 2, 4, 6 or 8.
      name: Name of the tensor in errors.

    Raises:
      ValueError: As ``check_quantizable``; or ``max_bits`` is not 2, 4, 6 or 8.
    """
    num_planes(max_bits)
    check_quantizable(w, name)
    scales = max_abs_scales(w)
    return from_codes(encode(w, scales), scales, max_bits=max_bits)


def check_quantizable(w: Shaped[Array, "..."], name: str) -> None:
    """Checks that ``w`` can be quantized.

    Raises:
      ValueError: ``w`` is not a matrix, is empty, is not of a float dtype, holds NaN or Inf, or needs a scale
        (half the largest magnitude of a group) that exceeds float16.
    """
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{name}: shape {tuple(w.shape)}, expected a non-empty matrix [in, out]")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: dtype {w.dtype}, expected a float dtype")
    bad, largest = map(float, _extent(w))
    if bad:
        raise ValueError(
            f"{name}: {bad:.0f} of {w.size} values are NaN or Inf; a quantizer cannot represent them"
        )
    limit = RANGE * float(jnp.finfo(jnp.float16).max)
    if largest > limit:
        raise ValueError(
            f"{name}: largest magnitude {largest:g} exceeds {limit:g}, the range of float16 scales"
        )


@jax.jit
def _extent(w: Float[Array, "k n"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Returns the number of values that are not finite, and the largest magnitude."""
    return jnp.sum(~jnp.isfinite(w)), jnp.max(jnp.abs(w.astype(jnp.float32)))


@jax.jit
def max_abs_scales(w: Float[Array, "k n"]) -> Float16[Array, "g n"]:
    """Returns ``max |w| / 2`` over each group of 128 input channels, rounded up to float16.

    A scale rounded down would clip the largest weights of the group: by a third if the scale is a subnormal
    float16. N is not padded.
    """
    k, n = w.shape
    w = jnp.pad(jnp.abs(w.astype(jnp.float32)), ((0, layout.round_up(k, layout.GROUP) - k), (0, 0)))
    half = w.reshape(-1, layout.GROUP, n).max(axis=1) / RANGE
    nearest = half.astype(jnp.float16)
    # The bits of the next larger non-negative float16 are the next integer.
    up = jax.lax.bitcast_convert_type(nearest, jnp.uint16) + (nearest.astype(jnp.float32) < half)
    return jax.lax.bitcast_convert_type(up.astype(jnp.uint16), jnp.float16)


@jax.jit
def encode(w: Float[Array, "k n"], scales: Float16[Array, "g n"]) -> UInt8[Array, "k n"]:
    """Returns 8-bit codes ``floor((w / scale + 2) * 64)``, clipped to 0..255; 128 where the scale is 0."""
    scale = jnp.repeat(scales.astype(jnp.float32), layout.GROUP, axis=0)[: w.shape[0]]
    ratio = jnp.where(scale > 0, w.astype(jnp.float32) / jnp.where(scale > 0, scale, 1), 0)
    return jnp.clip(jnp.floor((ratio + RANGE) * CODE_STEPS), 0, 255).astype(jnp.uint8)


@without_x64
def from_codes(
    codes: UInt8[Array, "k n"], scales: Float16[Array, "g n"], *, max_bits: int = 8
) -> NestedWeight:
    """Packs 8-bit codes and their scales into a weight whose level gains are all 1.

    Pads K and N (see ``layout.padded_shape``).

    Args:
      codes: One 8-bit code for each weight. The result stores its leading ``max_bits`` bits.
      scales: One float16 scale for each of ``g = ceil(k / 128)`` groups and each output; finite, ``>= 0``.
      max_bits: Bits of the stored code: 2, 4, 6 or 8.

    Raises:
      ValueError: ``max_bits`` is not 2, 4, 6 or 8, or the shapes of codes and scales do not match.
    """
    planes = num_planes(max_bits)
    in_features, out_features = codes.shape
    k, _ = layout.padded_shape(in_features, out_features)
    if scales.shape != (k // layout.GROUP, out_features):
        raise ValueError(
            f"scales has shape {scales.shape}, expected {(k // layout.GROUP, out_features)} "
            f"for codes of shape {codes.shape}"
        )
    packed, padded_scales = _pack_padded(codes, scales, planes)
    return NestedWeight(packed, padded_scales, in_features, out_features, jnp.ones(planes))


@jax.jit(static_argnums=2)
def _pack_padded(
    codes: UInt8[Array, "k n"], scales: Float16[Array, "g n"], planes: int
) -> tuple[UInt32[Array, "p k2 w"], Float16[Array, "g n2"]]:
    """Pads K and N (see ``layout.padded_shape``), and packs the codes."""
    k, n = layout.padded_shape(*codes.shape)
    padding = (0, n - codes.shape[1])
    codes = jnp.pad(codes, ((0, k - codes.shape[0]), padding))
    return pack(codes, planes), jnp.pad(scales, ((0, 0), padding))


@jax.jit(static_argnums=1)
def pack(codes: UInt8[Array, "k n"], planes: int) -> UInt32[Array, "p k w"]:
    """Splits padded codes into digits and packs each plane in the order of ``layout``."""
    stored = codes[:, layout.row_positions(codes.shape[1]).argsort()]
    return jnp.stack([_packed((stored >> (6 - layout.DIGIT_BITS * f)) & 3) for f in range(planes)])


def pack_digits(digits: UInt8[Array, "k n"]) -> UInt32[Array, "k w"]:
    """Packs the digits (0 to 3) of one plane, whose padded outputs are in logical order."""
    return _packed(digits[:, layout.row_positions(digits.shape[1]).argsort()])


def _packed(stored: UInt8[Array, "k n"]) -> UInt32[Array, "k w"]:
    """Packs digits in the order in which they are stored."""
    words = stored.reshape(len(stored), -1, layout.WORD_DIGITS).astype(jnp.uint32)
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32) * layout.DIGIT_BITS
    return jnp.sum(words << shifts, axis=-1, dtype=jnp.uint32)


def unpack_digit_major(words: UInt32[Array, "*any w"]) -> Int[Array, "*any 16 w"]:
    """Unpacks words into their digits (0 to 3), in the order of ``layout.digit_major_positions``."""
    shifts = jnp.arange(layout.WORD_DIGITS, dtype=jnp.uint32)[:, None] * layout.DIGIT_BITS
    return ((words[..., None, :] >> shifts) & 3).astype(jnp.int32)


def unpack(planes: UInt32[Array, "p k w"]) -> UInt8[Array, "p k n"]:
    """Unpacks planes into digits (0 to 3), with the outputs in logical order: the inverse of ``pack``."""
    return _logical_order(unpack_digit_major(planes).astype(jnp.uint8))


def _logical_order(digit_major):
    """Reorders the outputs of ``unpack_digit_major``, ``[..., 16, words]``, to logical order ``[..., N]``."""
    *leading, digits, words = digit_major.shape
    flat = digit_major.reshape(*leading, digits * words)
    return flat[..., layout.digit_major_positions(digits * words)]


@without_x64
def dequantize(
    weight: NestedWeight, level: Int[Array, "k"] | int | None = None, dtype=jnp.float32
) -> Float[Array, "k n"]:
    """Returns ``w_l`` of every weight, ``[in_features, out_features]``, computed in float32.

    Args:
      weight: The nested weight.
      level: Level of all input channels, or int ``[in_features]``, one level for each channel. Levels above
        the highest stored level read that level, which is also the default.
      dtype: Dtype of the result.
    """
    if level is None or isinstance(level, int):
        weight = dataclasses.replace(weight, planes=weight.planes[:level])
        level = weight.num_planes
    level = jnp.minimum(level, weight.num_planes)
    f = jnp.arange(weight.num_planes)[:, None]
    gain = grading.channel_gains(level, weight.level_gains)
    return _dequantize(weight, jnp.where(f < level, gain * 4.0**-f, 0.0), dtype)


@jax.jit(static_argnums=2)
def _dequantize(weight, digit_weights, dtype):
    """Dequantizes with ``digit_weights [P, K or 1]``: the factors of the planes' digits, 0 if not read."""
    planes = weight.planes[:, : weight.in_features]
    # Sums in the stored order, so that the outputs are permuted once and not for each plane.
    total = jnp.zeros((planes.shape[1], layout.WORD_DIGITS, planes.shape[2]), jnp.float32)
    for words, digit_weight in zip(planes, digit_weights, strict=True):
        total += (unpack_digit_major(words) - DIGIT_MEAN) * digit_weight[:, None, None]
    scale = jnp.repeat(weight.scales.astype(jnp.float32), layout.GROUP, axis=0)[: weight.in_features]
    return (_logical_order(total) * scale)[:, : weight.out_features].astype(dtype)


def level_errors(w: Float[Array, "k n"], weight: NestedWeight) -> Float[Array, "p1"]:
    """Returns ``e(l)``, the mean squared error of levels 0 to P; ``e(0)`` is the mean square of ``w``."""
    w = w.astype(jnp.float32)
    levels = range(weight.num_planes + 1)
    return jnp.stack([jnp.mean((w - dequantize(weight, level)) ** 2) for level in levels])
