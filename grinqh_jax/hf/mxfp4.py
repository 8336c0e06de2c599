"""MXFP4, the number format of gpt-oss's experts: blocks of 32 numbers of 4 bits with a common power of two.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

METHOD = "mxfp4"
"""``quant_method`` of configurations."""

BLOCK = 32
"""Number of neighbouring input channels that share a scale."""

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_VALUES, -_VALUES])
"""The number of each 4-bit code: a sign, two bits of exponent, one of mantissa."""

_EXPONENT_BIAS, _NAN = 127, 255


def dequantize(
    blocks: UInt8[np.ndarray, "*rows b 16"], scales: UInt8[np.ndarray, "*rows b"]
) -> Float[np.ndarray, "*rows channels"]:
    """Returns the numbers, bfloat16, which holds them exactly, unless they reach ``2**128``.

    Args:
      blocks: Codes of 32 input channels each, two in a byte, the first one in the low bits.
      scales: Biased exponents of the blocks; 255 is NaN.
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):  # 2 * 2**127 is infinite, which the converter refuses.
        values = np.ldexp(_NUMBERS[codes], scales[..., None].astype(np.int32) - _EXPONENT_BIAS)
    values[scales == _NAN] = np.nan
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)
