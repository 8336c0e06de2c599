"""Graded products of one activation row that compute the row in their prologue, and save a launch.

``deferred`` describes a row that is not computed yet, ``program`` the lane program, ``kernel`` the launch.
"""

from pallas_kernels.prologues.deferred import Deferred, Prologue
from pallas_kernels.prologues.kernel import partial_sums, supports

__all__ = ["Deferred", "Prologue", "partial_sums", "supports"]
