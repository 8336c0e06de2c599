"""Nested codes and the kernels that read them, the graded matvec first. Imports only jax and numpy."""

from pallas_kernels.activations import Activations
from pallas_kernels.codes import dequantize, from_codes, quantize
from pallas_kernels.grading import GradingStats, levels, realised_bits
from pallas_kernels.matmul import level_matmul
from pallas_kernels.matvec import graded_matvec, graded_partial_sums
from pallas_kernels.weight import NestedWeight

__all__ = [
    "Activations",
    "GradingStats",
    "NestedWeight",
    "dequantize",
    "from_codes",
    "graded_matvec",
    "graded_partial_sums",
    "level_matmul",
    "levels",
    "quantize",
    "realised_bits",
]
