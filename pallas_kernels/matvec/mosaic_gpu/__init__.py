"""The graded matvec for NVIDIA GPUs: a lane program in Pallas Mosaic GPU.

There are three programs. ``program`` gives every warp a list of plane rows to read, and is the default for 1
to 4 activation rows. In ``shared_list`` all warps of a CTA share a list. It is the default for 5 to 16 rows,
because it reads the weights only once. ``byte_pairs`` multiplies several activation rows with fewer
instructions than ``program``. It is not a default yet.

Read ``program`` first (the algorithm and the data layout) and ``lanes.instructions`` (its language). The
phases of the program follow in ``listing``, ``streaming`` and ``reduction``, and the statistics in
``counting``. ``geometry`` has the sizes, ``lane_context`` the operands and addresses, ``tuning`` the choice
of a configuration, ``kernel`` the launch.
"""

from pallas_kernels.matvec.mosaic_gpu.geometry import BytePairs, Config, SharedList
from pallas_kernels.matvec.mosaic_gpu.kernel import graded_matvec, partial_sums, supports

__all__ = ["BytePairs", "Config", "SharedList", "graded_matvec", "partial_sums", "supports"]
