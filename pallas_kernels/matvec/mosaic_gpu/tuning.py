"""The choice of a ``Config``: the best one measured for the shape, else a rule. No tuning at run time."""

import dataclasses
import functools
import importlib.resources
import json
import math

from pallas_kernels.lanes import device
from pallas_kernels.matvec.mosaic_gpu.byte_pairs.geometry import BytePairGeometry
from pallas_kernels.matvec.mosaic_gpu.config import BytePairs, Config, DenseRows
from pallas_kernels.matvec.mosaic_gpu.dense_rows.geometry import DenseRowsGeometry
from pallas_kernels.matvec.mosaic_gpu.geometry import SHARED_BYTES_LIMIT, STEP_BYTES, Geometry

# Constants of the rule's model of a launch, fitted to 48 measurements (12 configurations of 4 shapes) on an
# H200.
OVERHEAD = 2.8
"""Microseconds of a launch that reads almost nothing."""

WAVE_OVERHEAD = 1.8
"""Microseconds that each wave of CTAs after the first adds."""

PARTIAL_OVERHEAD = 0.01
"""Microseconds that the next kernel needs to read one more partial sum of every output."""

BYTES_PER_MICROSECOND_AND_SM = 4.7e6 / 132
"""Bytes that one multiprocessor reads in a microsecond while all of them read."""

HALF_SPEED_IN_FLIGHT = 8 * 1024
"""Bytes of copies in flight at which a multiprocessor reads at half its full speed."""

REGISTERS_OF_SM = 65536
"""Number of 32-bit registers of a multiprocessor."""

REGISTERS = 72
"""Number of registers of a lane in the program for one activation row."""

REGISTERS_OF_BYTE_PAIRS = {1: 128, 2: 128, 3: 192, 4: 192}
"""Number of registers of a lane in the program that multiplies pairs of bytes, by the number of activation
rows of a CTA."""

MAX_ROWS_OF_BYTE_PAIRS = 4
"""Largest number of activation rows for which the program that multiplies pairs of bytes can be the default.
It reads the weights twice for 5 to 8 rows."""

DENSE_ROWS = DenseRows(step_planes=2, ring_slots=8)
"""The fastest tuning of the program without lists on an H200, for 8 and for 16 rows
(``benchmarks/notes/2026-11-29-matvec-rows.md``, M31)."""

WARPGROUP_ROWS = 9
"""Smallest number of activation rows that are multiplied in warpgroups, where the device can. On an H200 the
layer takes as long in both ways at 8 rows, and 81 us instead of 96 at 16."""

MOST_COUNTING_CTAS = 4
"""Largest number of CTAs that compute the statistics in the program without lists."""

SHARED_BYTES_PER_SM = 227 * 1024
RESERVED_SHARED_BYTES = 1024
"""Bytes of shared memory that the driver reserves for each CTA."""

TYPICAL_BITS = 3.125
"""Bits read per weight, scales included, that the rule assumes."""


def best_config(
    geometry: Geometry, *, device_kind: str, multiprocessors: int, warpgroups: bool = False
) -> Config:
    """Returns the configuration for a launch.

    Args:
      geometry: Sizes of the launch; ``config`` is ignored.
      device_kind: JAX's name of the device, for example "NVIDIA H200".
      multiprocessors: Number of multiprocessors of the device.
      warpgroups: Whether the device multiplies in warpgroups (see ``device.no_warpgroup_products_reason``).
    """
    if geometry.rows > 1:
        # The order of sums is that of one row, so a row has the same bits alone and among up to 15 others.
        alone = best_config(
            dataclasses.replace(geometry, rows=1), device_kind=device_kind, multiprocessors=multiprocessors
        )
        limit = device.least_shared_memory(device_kind)
        config = None
        if geometry.rows <= MAX_ROWS_OF_BYTE_PAIRS:
            config = with_byte_pairs(geometry, alone, multiprocessors, limit)
        in_warpgroups = warpgroups and geometry.rows >= WARPGROUP_ROWS
        dense = dataclasses.replace(DENSE_ROWS, warpgroups=in_warpgroups)
        return config or with_dense_rows(geometry, alone, multiprocessors, limit, dense)
    measured = _measured().get(device_kind, {}).get((geometry.stored_k, geometry.stored_n))
    return measured or rule(geometry, multiprocessors)


def with_byte_pairs(geometry: Geometry, alone: Config, multiprocessors: int, limit: int) -> Config | None:
    """Returns the configuration of the program that multiplies pairs of bytes, or None if another is better.

    More than two rows take so many registers that fewer CTAs fit a multiprocessor. If the CTAs then need a
    second wave, the program without lists is faster: on 4096x24576 at 4 rows it takes 22.0 us where this one
    takes 24.8 (``benchmarks/notes/2026-11-29-matvec-rows.md``, M26 and M31). A deep ring covers the longer
    listing of more than two rows.

    Args:
      geometry: Sizes of the launch; ``config`` is ignored.
      alone: Configuration of a launch with one row.
      multiprocessors: Number of multiprocessors of the device.
      limit: Largest number of bytes of shared memory of a CTA. If even the smallest ring needs more, the
        result is None.
    """
    for slots in (8, 4, 2):
        config = dataclasses.replace(alone, byte_pairs=BytePairs(ring_slots=slots))
        launch = BytePairGeometry(**{**vars(geometry), "config": config})
        several = launch.rows_per_cta > 2
        if launch.shared_bytes > limit or (slots == 8 and not several):
            continue
        resident_ctas = REGISTERS_OF_SM // (REGISTERS_OF_BYTE_PAIRS[launch.rows_per_cta] * launch.threads)
        one_wave = launch.tiles * launch.splits <= resident_ctas * multiprocessors
        return config if one_wave or not several else None
    return None


def with_dense_rows(
    geometry: Geometry, alone: Config, multiprocessors: int, limit: int, dense: DenseRows = DENSE_ROWS
) -> Config:
    """Returns the configuration of the program without lists, or ``alone`` if its codes do not fit.

    A CTA takes the fewest tiles with which all CTAs that multiply run at once, one on a multiprocessor; four
    if none do. Up to four CTAs compute the statistics, on the multiprocessors that are left. If none is left,
    the four wait for the others. With ``alone`` each row reads the weights.

    Args:
      geometry: Sizes of the launch; ``config`` is ignored.
      alone: Configuration of a launch with one row.
      multiprocessors: Number of multiprocessors of the device.
      limit: Largest number of bytes of shared memory of a CTA.
      dense: Tuning. ``tiles`` and ``counting_ctas`` are chosen here, and ``ring_slots`` is halved while the
        ring does not fit.
    """

    def launch(tiles: int, slots: int) -> DenseRowsGeometry:
        chosen = dataclasses.replace(dense, tiles=tiles, ring_slots=slots)
        config = dataclasses.replace(alone, dense_rows=chosen)
        return DenseRowsGeometry(**{**vars(geometry), "config": config})

    slots = dense.ring_slots
    tiles = next((n for n in (1, 2, 3) if launch(n, slots).matvec_blocks <= multiprocessors), 4)
    while slots > 2 and launch(tiles, slots).shared_bytes > limit:
        slots //= 2
    chosen = launch(tiles, slots)
    if chosen.shared_bytes > limit:
        return alone
    left = multiprocessors - chosen.matvec_blocks
    counting_ctas = min(left, MOST_COUNTING_CTAS) if left > 0 else MOST_COUNTING_CTAS
    dense = dataclasses.replace(chosen.dense, counting_ctas=counting_ctas)
    return dataclasses.replace(alone, dense_rows=dense)


def rule(geometry: Geometry, multiprocessors: int) -> Config:
    """Returns the configuration for one row with the least ``expected_microseconds`` that fits every GPU.

    A good grid runs in one wave, its number of CTAs is slightly below a multiple of the number of
    multiprocessors, and it keeps enough copies in flight. Two warpgroups with one warp for each group are not
    a candidate: the codes of 16 rows in their 8 groups need more shared memory than every GPU has
    (``dense_rows``). ``geometry.config`` is ignored.
    """
    candidates = [
        dataclasses.replace(
            geometry, config=Config(warpgroups=warpgroups, warps_per_group=warps, ring_slots=slots)
        )
        for warpgroups in (1, 2)
        for warps in (1, 2, 4)
        for slots in (4, 8)
        if (warpgroups, warps) != (2, 1)
    ]
    fitting = [g for g in candidates if g.shared_bytes <= SHARED_BYTES_LIMIT]
    return min(fitting, key=lambda g: expected_microseconds(g, multiprocessors)).config


def expected_microseconds(geometry: Geometry, multiprocessors: int) -> float:
    """Estimates the time of a launch with one row at 3 bits, accurately enough to compare configurations."""
    config, blocks = geometry.config, geometry.matvec_blocks
    ctas_of_busiest = math.ceil(blocks / multiprocessors)
    resident_ctas = min(
        REGISTERS_OF_SM // (REGISTERS * geometry.threads),
        SHARED_BYTES_PER_SM // (geometry.shared_bytes + RESERVED_SHARED_BYTES),
    )
    waves = math.ceil(ctas_of_busiest / resident_ctas)
    imbalance = ctas_of_busiest * multiprocessors / blocks
    in_flight = min(ctas_of_busiest, resident_ctas) * config.warps * (config.ring_slots - 1) * STEP_BYTES
    bytes_read = geometry.stored_k * geometry.stored_n * TYPICAL_BITS / 8
    read_time = bytes_read / (BYTES_PER_MICROSECOND_AND_SM * multiprocessors)
    return (
        OVERHEAD
        + WAVE_OVERHEAD * (waves - 1)
        + PARTIAL_OVERHEAD * geometry.splits
        + read_time * imbalance**0.5 * (1 + HALF_SPEED_IN_FLIGHT / in_flight)
    )


@functools.cache
def _measured() -> dict[str, dict[tuple[int, int], Config]]:
    """Reads ``measured.json``, which ``benchmarks/matvec.py --tune`` writes."""
    text = importlib.resources.files(__package__).joinpath("measured.json").read_text()
    return {
        device: {(e["stored_k"], e["stored_n"]): Config(**e["config"]) for e in entries}
        for device, entries in json.loads(text).items()
    }
