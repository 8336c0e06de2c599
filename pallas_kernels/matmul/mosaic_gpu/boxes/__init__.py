"""The product at one level with copies of boxes, and sums that clusters add up.

``program`` describes the algorithm, ``geometry`` the sizes.
"""

from pallas_kernels.matmul.mosaic_gpu.boxes.geometry import Boxes, BoxesGeometry
from pallas_kernels.matmul.mosaic_gpu.boxes.lane_context import BoxesRefs
from pallas_kernels.matmul.mosaic_gpu.boxes.program import boxes_program

__all__ = ["Boxes", "BoxesGeometry", "BoxesRefs", "boxes_program"]
