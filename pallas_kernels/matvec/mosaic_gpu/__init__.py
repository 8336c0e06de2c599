"""The graded matvec for NVIDIA GPUs: a lane program in Pallas Mosaic GPU.

Read ``program`` first (the algorithm and the data layout), then ``lanes.instructions`` (its language),
``geometry`` (sizes), ``tuning`` (choice of a configuration) and ``kernel`` (the launch).
"""

from pallas_kernels.matvec.mosaic_gpu.geometry import Config
from pallas_kernels.matvec.mosaic_gpu.kernel import graded_matvec, partial_sums, supports

__all__ = ["Config", "graded_matvec", "partial_sums", "supports"]
