"""The graded matvec for several activation rows: every warp has a list, and multiplies pairs of bytes.

Read ``mosaic_gpu.program`` first.
"""

from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.program import byte_pair_program

__all__ = ["BytePairGeometry", "byte_pair_program"]
