"""The ground floor of GRINQH-JAX: nested codes and the graded matvec. Needs jax and numpy only."""

from pallas_kernels.codes import dequantize, from_codes, quantize
from pallas_kernels.grading import levels, realised_bits
from pallas_kernels.matvec import graded_matvec
from pallas_kernels.weight import NestedWeight

__all__ = ["NestedWeight", "dequantize", "from_codes", "graded_matvec", "levels", "quantize", "realised_bits"]
