"""The graded matvec for 5 to 16 activation rows: no list, all channels and planes in the order of storage.

Read ``program`` first.
"""

from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.program import dense_rows_program

__all__ = ["DenseRowsGeometry", "dense_rows_program"]
