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

_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE])
"""The number of each 4-bit code: a sign, two bits of exponent, one of mantissa."""

_BYTES = np.arange(256)
_PAIRS = np.stack([_NUMBERS[_BYTES & 15], _NUMBERS[_BYTES >> 4]], axis=-1).view(np.complex64)[:, 0]
"""The two numbers of each byte, the first one in the low bits, as one element: numpy gathers it faster."""

_SCALES = np.append(2.0 ** (np.arange(255) - 127), np.nan).astype(np.float32)
"""The scale of each biased exponent; 255 is NaN."""


def dequantize(
    blocks: UInt8[np.ndarray, "*rows b 16"], scales: UInt8[np.ndarray, "*rows b"]
) -> Float[np.ndarray, "*rows channels"]:
    """Returns the numbers, bfloat16, which holds them exactly, unless they reach ``2**128``.

    Args:
      blocks: Codes of 32 input channels each.
      scales: Biased exponents of the blocks.
    """
    values = _PAIRS[blocks].view(np.float32)
    with np.errstate(over="ignore"):  # 2 * 2**127 is infinite, which the converter refuses.
        values *= _SCALES[scales][..., None]
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)
