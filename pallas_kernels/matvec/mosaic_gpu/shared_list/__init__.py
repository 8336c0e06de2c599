"""The graded matvec for 2 to 16 activation rows: all warps of a CTA share one list of plane rows.

Read ``program`` first.
"""

from pallas_kernels.matvec.mosaic_gpu.shared_list.geometry import SharedListGeometry
from pallas_kernels.matvec.mosaic_gpu.shared_list.program import shared_list_program

__all__ = ["SharedListGeometry", "shared_list_program"]
