"""The graded matvec for several activation rows: the CTAs of a cluster divide the channels, each with a list.

Read ``mosaic_gpu.program`` and ``shared_list.program`` first.
"""

from pallas_kernels.matvec.mosaic_gpu.cluster_list.geometry import ClusterListGeometry
from pallas_kernels.matvec.mosaic_gpu.cluster_list.program import cluster_list_program

__all__ = ["ClusterListGeometry", "cluster_list_program"]
