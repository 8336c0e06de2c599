"""Finds the ``rope_scaling`` of Hugging Face's ``config.json`` for the rotary embedding of a GGUF file.

A GGUF file of a Llama 3 model does not contain the parameters of its scaled frequencies. It has the tensor
``rope_freqs.weight``, which divides each frequency. The parameters follow from it: with wavelength ``w`` and
original context ``c``, the divisor is 1 where ``w < c / high``, ``factor`` where ``w > c / low``, and between
them ``1 / ((1 - s) / factor + s)`` with ``s = (c / w - low) / (high - low)`` (``rope`` in transformers'
``modeling_rope_utils``). Scaling ``c``, ``low`` and ``high`` together changes nothing, so ``low`` is 1 here.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

_HIGH = 4.0
"""``high_freq_factor`` of all released models, for files with too few frequencies to determine it."""


def llama3_scaling(divisors: Float[np.ndarray, "n"], theta: float) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` with these divisors of the frequencies, or None if there is none.

    Args:
      divisors: Values of ``rope_freqs.weight``, one for each frequency, highest frequency first.
      theta: Base of the frequencies.
    """
    divisors = np.asarray(divisors, np.float64)
    count = len(divisors)
    factor = divisors.max()
    wavelengths = 2 * np.pi * theta ** (np.arange(count) / count)
    if factor <= 1 or divisors.min() <= 0:
        return None
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    inverse = 1 / wavelengths[between]
    if len(smooth) >= 2:  # s is linear in 1 / w
        slope, intercept = np.polyfit(inverse, smooth, 1)
        if intercept >= 0:
            return None
        high = 1 - 1 / intercept
        original = slope * (high - 1)
    elif len(smooth) == 1:
        high = _HIGH
        original = float((smooth[0] * (high - 1) + 1) / inverse[0])
    else:  # any context between the last wavelength that is kept and the first that is scaled
        high = _HIGH
        first = int(np.argmax(divisors > 1))
        last_kept = wavelengths[first - 1] if first else wavelengths[0] / theta
        original = max((high * last_kept * wavelengths[first]) ** 0.5, high * last_kept)
    scaling = {
        "rope_type": "llama3",
        "factor": float(f"{factor:.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{high:.4g}"),
        "original_max_position_embeddings": max(round(original), 1),
    }
    error = np.abs(_divisors(scaling, wavelengths) / divisors - 1).max()
    return scaling if error < 1e-3 else None


def _divisors(scaling: dict[str, Any], wavelengths: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns the divisors that ``scaling`` describes."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
