"""The graded matrix-vector product of activations and a nested weight."""

from pallas_kernels.matvec.api import (
    IMPLEMENTATIONS,
    Implementation,
    choose,
    graded_matvec,
    graded_partial_sums,
)

__all__ = ["IMPLEMENTATIONS", "Implementation", "choose", "graded_matvec", "graded_partial_sums"]
