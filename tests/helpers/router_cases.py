"""Random cases of the router, for the emulator and the GPU, and their oracle in float64."""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.router.geometry import RouterGeometry

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class RouterCase:
    """Sizes of one launch.

    Attributes:
      rows, features, experts, chosen, normalized, num_square_partials, biased: See ``RouterGeometry``.
      dtype: Dtype of the router's kernel.
      seed: Seed of the arrays.
    """

    rows: int
    features: int
    experts: int
    chosen: int
    normalized: bool = True
    num_square_partials: int = 4
    biased: bool = False
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def geometry(self) -> RouterGeometry:
        """The sizes as the kernel has them."""
        fields = {k: v for k, v in vars(self).items() if k not in ("dtype", "seed")}
        return RouterGeometry(**fields, kernel_bytes=4 if self.dtype == "float32" else 2, eps=EPS)

    @property
    def bias(self) -> np.ndarray | None:
        """Bias of the scores, or None."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal(self.experts, np.float32) if self.biased else None

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns x, square partials or None, and the kernel, of NumPy arrays."""
        rng = np.random.default_rng(self.seed)
        x = rng.standard_normal((self.rows, self.features)).astype(ml_dtypes.bfloat16)
        kernel = rng.standard_normal((self.features, self.experts)) * 2 * self.features**-0.5
        squares = None
        if self.num_square_partials:
            shape = self.rows, self.num_square_partials
            squares = (rng.uniform(0.2, 2, shape) / self.num_square_partials).astype(np.float32)
        return x, squares, kernel.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)


@dataclasses.dataclass(frozen=True)
class Exact:
    """Results of a router in float64: experts, probabilities, and mean squares as ``RouterRefs`` has them."""

    experts: np.ndarray
    probabilities: np.ndarray
    mean_squares: np.ndarray


def oracle(case: RouterCase, x: np.ndarray, squares: np.ndarray | None, kernel: np.ndarray) -> Exact:
    """Returns what a router computes; equal scores are in ascending order of their experts."""
    mean = np.ones(len(x)) if squares is None else squares.astype(np.float64).sum(1) + EPS
    kernel = kernel.astype(ml_dtypes.bfloat16).astype(np.float64)
    scores = x.astype(np.float64) @ kernel
    if squares is not None:
        scores = scores / np.sqrt(mean)[:, None]
    if case.bias is not None:
        scores = scores + case.bias
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    experts = np.argsort(-scores, axis=1, kind="stable")[:, : case.chosen]
    probabilities = np.take_along_axis(exponentials, experts, 1)
    probabilities /= (probabilities if case.normalized else exponentials).sum(1, keepdims=True)
    factor = 2.0 ** np.floor(np.log2(np.maximum(probabilities, 2.0**-16) * 2**0.5))
    return Exact(experts, probabilities, mean[:, None] / factor**2)


def assert_agrees_with_oracle(case: RouterCase, arrays, experts, probabilities, mean_squares) -> None:
    """Compares the results of a launch with the oracle; experts must be equal."""
    exact = oracle(case, *arrays)
    np.testing.assert_array_equal(experts, exact.experts)
    np.testing.assert_allclose(probabilities, exact.probabilities, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(mean_squares, exact.mean_squares, rtol=1e-5)
