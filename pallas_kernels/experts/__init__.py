"""The graded products of the chosen experts of a mixture."""

from pallas_kernels.experts.api import (
    IMPLEMENTATIONS,
    ExpertsImplementation,
    choose,
    experts_matvec,
)

__all__ = ["IMPLEMENTATIONS", "ExpertsImplementation", "choose", "experts_matvec"]
