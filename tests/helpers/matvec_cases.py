"""Cases of the graded matvec and their float64 oracle, run on the emulator here and on a GPU with -m gpu."""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels import NestedWeight, layout
from pallas_kernels.matvec.mosaic_gpu import Config

RELATIVE_ERROR = 1e-3
"""Bound of the design, for Gaussian and heavy-tailed activations."""

UNIFORM_VARIANCE = 4 / 3
"""Of codes that are uniform on (-2, 2)."""

DEFAULT_CONFIG = Config(warpgroups=1, warps_per_slice=2, ring_slots=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One matvec. ``activations`` names a distribution of x (see ``draw_x``)."""

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
        """x, weight and thresholds, all of numpy arrays."""
        rng = np.random.default_rng(self.seed)
        k, n = layout.padded_shape(self.in_features, self.out_features)
        planes = rng.integers(0, 2**32, (self.max_bits // 2, k, n // layout.WORD_DIGITS), np.uint32)
        scales = rng.uniform(0.5, 1.5, (k // layout.GROUP, n)).astype(np.float16)
        # Padding is left full of codes on purpose: nothing may depend on it.
        gains = np.append(rng.uniform(0.5, 1.5, self.max_bits // 2 - 1), 1).astype(np.float32)
        weight = NestedWeight(planes, scales, self.in_features, self.out_features, gains)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        x = draw_x(rng, (self.rows, self.in_features), self.activations).astype(dtype)
        return x, weight, draw_thresholds(rng, np.abs(x.astype(np.float32)), weight.num_planes)


def draw_x(rng: np.random.Generator, shape: tuple[int, int], activations: str) -> np.ndarray:
    """f32 activations: "gaussian", "outliers" (1 % are 1000 times larger), "heavy" (Student t, 2.5 degrees
    of freedom), "zeros" (half are exactly 0), "all-zero"."""
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
    """f32 [rows, planes], ascending: in each row a magnitude of that row, or (sometimes) 0 or Inf."""
    chosen = np.sort(rng.choice(magnitudes, (planes,), axis=1), axis=1)
    kind = rng.integers(0, 4, magnitudes.shape[0])
    chosen[kind == 0, 0] = 0
    chosen[kind == 1, -1] = np.inf
    return chosen.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The oracle's results, float64."""

    y: np.ndarray
    """[rows, out_features]"""
    spread: np.ndarray
    """[rows, out_features]: root of the summed squares of x times a weight's typical size, what y would be
    without luck: neither do its terms cancel, nor is a weight a thousandth of its scale."""
    bits: np.ndarray
    """[rows]"""


def oracle(x: np.ndarray, weight: NestedWeight, thresholds: np.ndarray) -> Exact:
    """Straight from the formula in ``NestedWeight``."""
    x, thresholds = np.asarray(x, np.float64), np.asarray(thresholds, np.float64)
    level = (~(np.abs(x)[:, :, None] < thresholds[:, None, :])).sum(-1)
    digits = unpacked(np.asarray(weight.planes))[:, : weight.in_features, : weight.out_features]
    scales = np.repeat(np.asarray(weight.scales, np.float64), layout.GROUP, 0)
    scales = scales[: weight.in_features, : weight.out_features]
    y, squares = np.zeros((2, x.shape[0], weight.out_features))
    read = np.zeros(digits.shape[1:])
    for planes_read in range(1, weight.num_planes + 1):
        read = read + digits[planes_read - 1] * 4.0 ** -(planes_read - 1)
        gained = scales * float(weight.gains[planes_read - 1])
        chosen = np.where(level == planes_read, x, 0)
        y += chosen @ (gained * (read + 0.5 * 4.0 ** (1 - planes_read) - 2))
        squares += chosen**2 @ (gained**2 * UNIFORM_VARIANCE)
    return Exact(y, np.sqrt(squares), 2.0 * level.mean(1))


def unpacked(planes: np.ndarray) -> np.ndarray:
    """Digits ``[P, K, N]`` of planes ``[P, K, N / 16]``, outputs in logical order."""
    digits = (planes[..., None] >> np.arange(0, 32, 2, np.uint32)) & 3
    tiles = digits.reshape(*planes.shape[:2], -1, layout.TILE)[..., layout.TILE_POSITIONS]
    return tiles.reshape(*planes.shape[:2], -1)


def assert_close(exact: Exact, y: np.ndarray, bits: np.ndarray) -> None:
    """Each row of y in norm (of y, or of its spread where y happens to be small), bits exactly."""
    y = np.asarray(y, np.float64)
    assert y.shape == exact.y.shape
    scale = np.maximum(np.linalg.norm(exact.y, axis=1), np.linalg.norm(exact.spread, axis=1))
    errors = np.linalg.norm(y - exact.y, axis=1)
    assert (errors <= RELATIVE_ERROR * scale).all(), f"errors {errors} at scales {scale}"
    np.testing.assert_allclose(np.asarray(bits), exact.bits, rtol=1e-6)
