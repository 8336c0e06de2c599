"""Device time of each kernel of a jitted function, from JAX's profiler."""

import collections
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

WARM_UP_SECONDS = 0.25
"""Duration of the warm-up, long enough for the GPU's clocks to rise."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Device time of the launches of one kernel, microseconds."""

    median: float
    quartiles: tuple[float, float]
    launches: int

    @classmethod
    def of(cls, durations: list[float]) -> "Times":
        """Summarizes the durations of single launches, microseconds."""
        if len(durations) < 2:
            raise RuntimeError(f"the profiler saw {len(durations)} launches of the kernel, expected several")
        low, _, high = statistics.quantiles(durations, n=4)
        return cls(statistics.median(durations), (low, high), len(durations))


def profile(function: Callable[[], object], repeats: int = 5) -> dict[str, list[float]]:
    """Profiles a warm function; returns kernel name -> durations of its launches, microseconds.

    Args:
      function: Jitted function without arguments. Each call is waited for.
      repeats: Number of profiled calls.
    """
    durations = collections.defaultdict(list)
    for name, _, duration in profile_events(function, repeats):
        durations[name].append(duration)
    return dict(durations)


def profile_events(function: Callable[[], object], repeats: int = 5) -> list[tuple[str, str, float]]:
    """Profiles as ``profile`` does; returns name, launch parameters and microseconds of each launch."""
    start = time.monotonic()
    while time.monotonic() - start < WARM_UP_SECONDS:
        jax.block_until_ready(function())
    events = []
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(repeats):
                jax.block_until_ready(function())
        (trace,) = pathlib.Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        for plane in data.planes:
            if "/device:GPU" not in plane.name:
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        details = next((str(v) for key, v in event.stats if key == "kernel_details"), "")
                        events.append((event.name, details, event.duration_ns / 1e3))
    return events


def read_bandwidth() -> float:
    """Returns the GPU's read bandwidth, bytes per second: the kernel time of summing 4 GiB of float32."""
    data = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.float32)
    total = jax.jit(lambda a: a.reshape(-1, 1 << 14).sum())
    durations = profile(lambda: total(data))
    longest = max(durations.values(), key=sum)
    return data.nbytes / statistics.median(longest) * 1e6
