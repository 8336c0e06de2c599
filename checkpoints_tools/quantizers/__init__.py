"""Quantizers: functions from a weight, and statistics of its inputs, to 8-bit codes and scales."""

from collections.abc import Callable

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers.rounded_weight import LevelFit, RoundedWeight, level_fit
from checkpoints_tools.quantizers.rtn import rtn

Quantizer = Callable[..., RoundedWeight]
"""``quantizer(w [K, N], statistics: LinearStatistics, *, name) -> RoundedWeight``.

``w`` is float32 and holds some or all outputs of a layer; a quantizer rounds each output independently of the
others. ``name`` names the layer in errors. Raises ValueError if ``w`` cannot be quantized.
"""

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn}
"""Quantizers by the name that ``--quantizer`` and the provenance of a checkpoint use."""

__all__ = ["QUANTIZERS", "LevelFit", "LinearStatistics", "Quantizer", "RoundedWeight", "level_fit", "rtn"]
