"""The programs that ``rows`` checks and times, and the activations that it gives them."""

import dataclasses

import numpy as np

from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu.config import BytePairs, SharedList

CORRELATION = 0.5
"""Standard deviation of the logarithm of the magnitude that the rows of a channel share."""

Program = SharedList | BytePairs

VARIANTS: dict[str, Program | None] = {
    "8 warps, 8 slots": SharedList(warps=8, ring_slots=8, step_entries=32),
    "8 warps, 16 slots": SharedList(warps=8, ring_slots=16, step_entries=32),
    "8 warps, steps of 64": SharedList(warps=8, ring_slots=8, step_entries=64),
    "4 warps, 8 slots": SharedList(warps=4, ring_slots=8, step_entries=32),
    "pairs, 4 slots": BytePairs(ring_slots=4),
    "pairs, 8 slots": BytePairs(ring_slots=8),
    "default": None,
}
"""Programs to compare. 4 warps in a shared list where the configuration of a shape allows it, else 8."""


def config_of(base: Config, program: Program) -> Config:
    """Returns the configuration of one row with a program for several rows."""
    if isinstance(program, BytePairs):
        return dataclasses.replace(base, byte_pairs=program)
    if program.warps < base.warps:
        program = dataclasses.replace(program, warps=base.warps)
    return dataclasses.replace(base, shared_list=program)


def takes(program: Program | None, rows: int) -> bool:
    """Returns whether the program is for this number of rows."""
    if isinstance(program, SharedList):
        return rows > 1
    return program is None or rows <= 8


def draw_x(rows: int, k: int, kind: str, seed: int = 0) -> np.ndarray:
    """Draws float32 ``[rows, k]``: "random", "correlated" or "cauchy" (clipped at 1000 times its scale)."""
    rng = np.random.default_rng(seed)
    if kind == "cauchy":
        return np.clip(rng.standard_cauchy((rows, k)), -1000, 1000).astype(np.float32)
    x = rng.standard_normal((rows, k))
    if kind == "correlated":
        x = x * np.exp(CORRELATION * rng.standard_normal(k))
    return x.astype(np.float32)
