"""Which ``Config`` a launch gets: the measured best where there is one, else a rule. No autotuning."""

import dataclasses
import functools
import importlib.resources
import json
import math

from pallas_kernels.matvec.mosaic_gpu.geometry import SHARED_BYTES_LIMIT, STEP_BYTES, Config, Geometry

# The rule's model of a launch, fitted to 48 measurements (12 configurations of 4 shapes) on an H200.
OVERHEAD = 2.8
"""Microseconds of a launch that reads next to nothing."""

WAVE_OVERHEAD = 1.8
"""Microseconds that each further wave of CTAs adds."""

PARTIAL_OVERHEAD = 0.01
"""Microseconds for every partial sum of an output that somebody has to add up."""

BYTES_PER_MICROSECOND_AND_SM = 4.7e6 / 132
"""What one multiprocessor reads when all of them do."""

HALF_SPEED_IN_FLIGHT = 8 * 1024
"""Bytes of copies in flight on a multiprocessor at which it reads at half its speed."""

REGISTERS = {1: 72, 2: 112, 3: 168, 4: 200}
"""Registers of a lane, by activation rows that share a read (of 65,536 on a multiprocessor)."""

SHARED_BYTES_PER_SM = 227 * 1024
SHARED_BYTES_OF_SYSTEM = 1024
"""What the driver takes of it for each CTA."""

TYPICAL_BITS = 3.125


def best_config(geometry: Geometry, *, device_kind: str, multiprocessors: int) -> Config:
    """The configuration for a launch.

    Args:
      geometry: the launch; its ``config`` is ignored.
      device_kind: as JAX names it, for example "NVIDIA H200".
      multiprocessors: of the device.
    """
    measured = _measured().get(device_kind, {}).get((geometry.stored_k, geometry.stored_n))
    return measured if measured and geometry.rows == 1 else rule(geometry, multiprocessors)


def rule(geometry: Geometry, multiprocessors: int) -> Config:
    """The configuration that the model expects to be fastest, of those that fit every GPU.

    The grid should be just under a multiple of the multiprocessors, run in one wave, and keep enough copies
    in flight. ``geometry.config`` is ignored.
    """
    candidates = [
        dataclasses.replace(
            geometry, config=Config(warpgroups=groups, warps_per_slice=warps, ring_slots=slots)
        )
        for groups in (1, 2)
        for warps in (1, 2, 4)
        for slots in (4, 8)
    ]
    fitting = [g for g in candidates if g.shared_bytes <= SHARED_BYTES_LIMIT]
    return min(fitting, key=lambda g: expected_microseconds(g, multiprocessors)).config


def expected_microseconds(geometry: Geometry, multiprocessors: int) -> float:
    """The model's time of one launch at 3 bits, good for comparing configurations."""
    config, blocks = geometry.config, geometry.matvec_blocks
    of_busiest = math.ceil(blocks / multiprocessors)
    at_once = min(
        65536 // (REGISTERS[geometry.rows_per_cta] * geometry.threads),
        SHARED_BYTES_PER_SM // (geometry.shared_bytes + SHARED_BYTES_OF_SYSTEM),
    )
    waves = math.ceil(of_busiest / at_once)
    unevenness = of_busiest * multiprocessors / blocks
    in_flight = min(of_busiest, at_once) * config.warps * (config.ring_slots - 1) * STEP_BYTES
    read = geometry.row_groups * geometry.stored_k * geometry.stored_n * TYPICAL_BITS / 8
    reading = read / (BYTES_PER_MICROSECOND_AND_SM * multiprocessors)
    return (
        OVERHEAD
        + WAVE_OVERHEAD * (waves - 1)
        + PARTIAL_OVERHEAD * geometry.slice_groups
        + reading * unevenness**0.5 * (1 + HALF_SPEED_IN_FLIGHT / in_flight)
    )


@functools.cache
def _measured() -> dict[str, dict[tuple[int, int], Config]]:
    """``measured.json``, written by ``benchmarks/matvec.py --tune``."""
    text = importlib.resources.files(__package__).joinpath("measured.json").read_text()
    return {
        device: {(e["stored_k"], e["stored_n"]): Config(**e["config"]) for e in entries}
        for device, entries in json.loads(text).items()
    }
