"""Which ``Config`` a launch gets: the measured best where there is one, else a rule. No autotuning."""

import functools
import importlib.resources
import json

from pallas_kernels import layout
from pallas_kernels.matvec.mosaic_gpu.geometry import Config

WARPS_PER_SM = 24
"""Warps that run at once on a multiprocessor, by their registers (80 each lane, 65,536 in all)."""

WARPS_WANTED = 8
"""Warps a multiprocessor needs to keep enough copies under way."""


def best_config(stored_k: int, stored_n: int, *, device_kind: str, multiprocessors: int) -> Config:
    """The configuration for a weight of this stored shape.

    Args:
      stored_k: K padded to the slice.
      stored_n: N padded to the tile.
      device_kind: as JAX names it, for example "NVIDIA H200".
      multiprocessors: of the device.
    """
    measured = _measured().get(device_kind, {}).get((stored_k, stored_n))
    return measured or rule(stored_k, stored_n, multiprocessors)


def rule(stored_k: int, stored_n: int, multiprocessors: int) -> Config:
    """The grid that divides best over the multiprocessors.

    All CTAs should run in one wave, and their count should be just under a multiple of the
    multiprocessors: an uneven count costs 10 to 30 %. Among equally even grids the one with fewer warps to
    a slice wins, since grading is repeated by each of them, but a multiprocessor needs some warps.
    """
    slices, tiles = stored_k // layout.SLICE, stored_n // layout.TILE

    def cost(config: Config) -> float:
        blocks = tiles * -(-slices // config.slices_per_cta)
        rounds = -(-blocks // multiprocessors)
        unevenness = rounds * multiprocessors / blocks
        warps = rounds * config.warps
        starved = max(1.0, WARPS_WANTED / warps)
        waves = max(1.0, warps / WARPS_PER_SM)
        repeated = 1 + 0.02 * config.warps_per_slice
        return unevenness**0.5 * starved * waves * repeated

    candidates = [
        Config(warpgroups=g, warps_per_slice=w, ring_slots=8 if g == 2 else 4)
        for g in (1, 2)
        for w in (1, 2, 4)
    ]
    return min(candidates, key=cost)


@functools.cache
def _measured() -> dict[str, dict[tuple[int, int], Config]]:
    """``measured.json``, written by ``benchmarks/matvec.py --tune``."""
    text = importlib.resources.files(__package__).joinpath("measured.json").read_text()
    return {
        device: {(e["stored_k"], e["stored_n"]): Config(**e["config"]) for e in entries}
        for device, entries in json.loads(text).items()
    }
