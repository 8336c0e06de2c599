"""The graded matvec for NVIDIA GPUs: a lane program in Pallas Mosaic GPU.

Reading order: ``program`` (the algorithm and the data layout), ``lanes.instructions`` (what it is written
in), ``geometry`` (sizes), ``tuning``, ``kernel`` (the launch).
"""

from pallas_kernels.matvec.mosaic_gpu.geometry import Config
from pallas_kernels.matvec.mosaic_gpu.kernel import graded_matvec, partial_sums, supports

__all__ = ["Config", "graded_matvec", "partial_sums", "supports"]
