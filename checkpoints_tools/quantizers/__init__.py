"""Quantizers: functions from a weight and what is known about its inputs to nested codes."""

from collections.abc import Callable

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers.rtn import rtn
from pallas_kernels import NestedWeight

Quantizer = Callable[..., NestedWeight]
"""``quantizer(w [K, N], statistics: LinearStatistics, *, max_bits, name) -> NestedWeight``.

``w`` is float32 and may be any range of a layer's outputs, which are quantized independently of one
another; ``name`` is what errors call the layer. Raises ValueError where w cannot be quantized.
"""

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn}
"""By the name that ``--quantizer`` and the checkpoint's provenance give them."""

__all__ = ["QUANTIZERS", "LinearStatistics", "Quantizer", "rtn"]
