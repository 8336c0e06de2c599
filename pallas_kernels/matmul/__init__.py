"""The product of activations and a nested weight that is read at one level, for many rows."""

from pallas_kernels.matmul.api import (
    IMPLEMENTATIONS,
    LevelImplementation,
    choose,
    level_matmul,
)

__all__ = ["IMPLEMENTATIONS", "LevelImplementation", "choose", "level_matmul"]
