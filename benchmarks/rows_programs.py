"""The programs that ``rows`` checks and times, and the activations that it gives them."""

import dataclasses

import jax
import numpy as np

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.matvec.mosaic_gpu import Config, kernel, tuning
from pallas_kernels.matvec.mosaic_gpu.config import BytePairs, DenseRows

CORRELATION = 0.5
"""Standard deviation of the logarithm of the magnitude that the rows of a channel share."""

MULTIPROCESSORS = 132
"""Multiprocessors of an H200."""

Program = BytePairs | DenseRows

VARIANTS: dict[str, Program | None] = {
    "default": None,
    "dense": DenseRows(),
    "dense, warpgroups": DenseRows(warpgroups=True),
    "dense, warpgroups, 4 planes": DenseRows(step_planes=4, ring_slots=4, warpgroups=True),
    "pairs, 4 slots": BytePairs(ring_slots=4),
    "pairs, 8 slots": BytePairs(ring_slots=8),
}
"""Programs to compare, the most important first. The tiles of a CTA without lists, and its ring if this one
does not fit, follow from the shape."""


def config_of(base: Config, program: Program, rows: int, weight: NestedWeight) -> Config:
    """Returns the configuration of one row with a program for several rows."""
    if isinstance(program, BytePairs):
        return dataclasses.replace(base, byte_pairs=program)
    x = jax.eval_shape(Activations.of, jax.ShapeDtypeStruct((rows, weight.in_features), "float32"))
    geometry = kernel.geometry_of(x, weight, base)
    return tuning.with_dense_rows(geometry, base, MULTIPROCESSORS, tuning.SHARED_BYTES_PER_SM, program)


def takes(program: Program | None, rows: int) -> bool:
    """Returns whether the program is for this number of rows."""
    if isinstance(program, BytePairs):
        return rows <= 8
    return program is None or rows > 1


def draw_x(rows: int, k: int, kind: str, seed: int = 0) -> np.ndarray:
    """Draws float32 ``[rows, k]``: "random", "correlated" or "cauchy" (clipped at 1000 times its scale)."""
    rng = np.random.default_rng(seed)
    if kind == "cauchy":
        return np.clip(rng.standard_cauchy((rows, k)), -1000, 1000).astype(np.float32)
    x = rng.standard_normal((rows, k))
    if kind == "correlated":
        x = x * np.exp(CORRELATION * rng.standard_normal(k))
    return x.astype(np.float32)
