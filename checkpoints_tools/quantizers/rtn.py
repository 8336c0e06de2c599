"""Round to nearest: symmetric max-abs scales, and for each weight the code whose interval holds it."""

from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers.rounded_weight import RoundedWeight
from pallas_kernels import codes


def rtn(w: Float[Array, "k n"], statistics: LinearStatistics, *, name: str) -> RoundedWeight:
    """Rounds ``w``, ignoring the statistics (see ``Quantizer`` and ``pallas_kernels.codes.quantize``)."""
    del statistics
    codes.check_quantizable(w, name)
    scales = codes.max_abs_scales(w)
    return RoundedWeight(codes.encode(w, scales), scales)
