"""The product at one level on NVIDIA GPUs: a lane program that multiplies the planes without a dense copy.

``program`` describes the algorithm, ``geometry`` the sizes, and ``kernel`` the launch.
"""

from pallas_kernels.matmul.mosaic_gpu.kernel import matmul, supports

__all__ = ["matmul", "supports"]
