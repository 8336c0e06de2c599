"""The graded matvec for NVIDIA GPUs: a lane program in Pallas Mosaic GPU.

There are three programs. ``program`` gives every warp a list of plane rows to read, and is the default for
one activation row. ``byte_pairs`` multiplies up to four rows with one read of the weights, and is the
default for 2 to 4 rows. ``dense_rows`` multiplies up to 16 rows with one read, in the order of storage. It is
the default for 5 to 16 rows, and for 3 and 4 rows where ``byte_pairs`` takes several waves of CTAs.

Read ``program`` first (the algorithm and the data layout) and ``lanes.instructions`` (its language). The
phases of the program follow in ``listing``, ``streaming`` and ``reduction``, and the statistics in
``counting``. ``config`` has the tuning, ``geometry`` the sizes, ``lane_context`` the operands and addresses,
``tuning`` the choice of a configuration, ``kernel`` the launch.
"""

from pallas_kernels.matvec.mosaic_gpu.config import BytePairs, Config, DenseRows
from pallas_kernels.matvec.mosaic_gpu.kernel import graded_matvec, partial_sums, supports

__all__ = ["BytePairs", "Config", "DenseRows", "graded_matvec", "partial_sums", "supports"]
