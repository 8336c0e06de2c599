"""Random cases of the graded matvec kernel, for the emulator and the GPU, and their error bound."""

import dataclasses

import matvec_oracle
import ml_dtypes
import numpy as np

from pallas_kernels import NestedWeight
from pallas_kernels.matvec.mosaic_gpu import Config

RELATIVE_ERROR = 1e-3
"""Largest error of a row of outputs in norm, for Gaussian and heavy-tailed activations."""

DEFAULT_CONFIG = Config(warpgroups=1, warps_per_group=2, ring_slots=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and distribution of one matvec; ``draw_x`` lists the values of ``activations``."""

    in_features: int
    out_features: int
    rows: int = 1
    max_bits: int = 8
    dtype: str = "float32"
    activations: str = "gaussian"
    config: Config | None = DEFAULT_CONFIG
    seed: int = 0

    def __str__(self):
        config = "best" if self.config is None else "-".join(map(str, self.config.__dict__.values()))
        return (
            f"{self.in_features}x{self.out_features}-r{self.rows}-b{self.max_bits}-{self.dtype}"
            f"-{self.activations}-{config}"
        )

    def arrays(self) -> tuple[np.ndarray, NestedWeight, np.ndarray]:
        """Returns x, weight and thresholds, all of NumPy arrays."""
        rng = np.random.default_rng(self.seed)
        k, n = matvec_oracle.padded_shape(self.in_features, self.out_features)
        planes = rng.integers(0, 2**32, (self.max_bits // 2, k, n // matvec_oracle.WORD_OUTPUTS), np.uint32)
        # The padding holds random codes and scales, so a kernel that depends on it fails.
        scales = rng.uniform(0.5, 1.5, (k // matvec_oracle.GROUP, n)).astype(np.float16)
        gains = np.append(rng.uniform(0.5, 1.5, self.max_bits // 2 - 1), 1).astype(np.float32)
        weight = NestedWeight(planes, scales, self.in_features, self.out_features, gains)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        x = draw_x(rng, (self.rows, self.in_features), self.activations).astype(dtype)
        return x, weight, draw_thresholds(rng, np.abs(x.astype(np.float32)), weight.num_planes)


def draw_x(rng: np.random.Generator, shape: tuple[int, int], activations: str) -> np.ndarray:
    """Draws float32 activations.

    ``activations`` is "gaussian", "outliers" (1 % are 1000 times larger), "heavy" (Student t with 2.5 degrees
    of freedom), "zeros" (half are exactly 0) or "all-zero".
    """
    x = rng.standard_normal(shape)
    if activations == "outliers":
        x = np.where(rng.random(shape) < 0.01, 1000 * x, x)
    elif activations == "heavy":
        x = rng.standard_t(2.5, shape)
    elif activations == "zeros":
        x = np.where(rng.random(shape) < 0.5, 0.0, x)
    elif activations == "all-zero":
        x = np.zeros(shape)
    return x.astype(np.float32)


def draw_thresholds(rng: np.random.Generator, magnitudes: np.ndarray, planes: int) -> np.ndarray:
    """Draws float32 ``[rows, planes]``, ascending, from each row's own magnitudes.

    In a quarter of the rows the first threshold is 0; in another quarter the last one is Inf.
    """
    chosen = np.sort(rng.choice(magnitudes, (planes,), axis=1), axis=1)
    kind = rng.integers(0, 4, magnitudes.shape[0])
    chosen[kind == 0, 0] = 0
    chosen[kind == 1, -1] = np.inf
    return chosen.astype(np.float32)


def assert_agrees_with_oracle(
    x: np.ndarray, weight: NestedWeight, thresholds: np.ndarray, y: np.ndarray, bits: np.ndarray
) -> None:
    """Checks each row of ``y`` in norm, and the mean bits read.

    Errors are relative to the norm of the exact row, or to its spread where the row happens to be small.
    """
    exact = matvec_oracle.graded_matvec(x, weight, thresholds)
    y = np.asarray(y, np.float64)
    assert y.shape == exact.y.shape
    scale = np.maximum(np.linalg.norm(exact.y, axis=1), np.linalg.norm(exact.spread, axis=1))
    errors = np.linalg.norm(y - exact.y, axis=1)
    assert (errors <= RELATIVE_ERROR * scale).all(), f"errors {errors} at scales {scale}"
    np.testing.assert_allclose(np.asarray(bits), exact.bits, rtol=1e-6)
