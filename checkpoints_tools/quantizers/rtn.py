"""Round to nearest: symmetric max-abs scales, each weight in the interval that holds it."""

from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import LinearStatistics
from pallas_kernels import NestedWeight, quantize


def rtn(w: Float[Array, "k n"], statistics: LinearStatistics, *, max_bits: int, name: str) -> NestedWeight:
    """See ``Quantizer``; looks at the weights only (``pallas_kernels.codes.quantize``)."""
    del statistics
    return quantize(w, max_bits=max_bits, name=name)
