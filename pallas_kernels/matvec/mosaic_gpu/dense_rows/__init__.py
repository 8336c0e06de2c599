"""The graded matvec for 5 to 16 activation rows: no list, all channels and planes in the order of storage.

Read ``program`` first. ``coding_program`` is the launch before it, with ``DenseRows.coded``.
"""

from pallas_kernels.matvec.mosaic_gpu.dense_rows.coded import CodedActivations
from pallas_kernels.matvec.mosaic_gpu.dense_rows.coding_program import coding_program
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import CodingGeometry, DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.dense_rows.program import dense_rows_program

__all__ = [
    "CodedActivations",
    "CodingGeometry",
    "DenseRowsGeometry",
    "coding_program",
    "dense_rows_program",
]
