"""Times the steps of a round of the decode loop on the host, for ``serving_rounds``."""

import collections
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.serving.shared_pages import SharedPages

DONATED = {"prefill": 1, "generate": 1, "insert": 0, "free": 0}
"""Number of the argument that each program donates."""


class Steps:
    """Times nested functions, each without those that it calls.

    Attributes:
      rounds: For each round that has ended, label -> calls, seconds, arrays and bytes.
    """

    def __init__(self):
        self.rounds: list[dict[str, np.ndarray]] = []
        self._round: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
        self._inner = [0.0]

    def wrap(self, owner: Any, name: str, label: Callable[..., str] | str) -> None:
        """Replaces a method by one that is timed. ``label`` may depend on its arguments."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                key = label if isinstance(label, str) else label(*args)
                leaves = jax.tree.leaves((args, kwargs)) if name in ("_run", "_put") else []
                arrays = [leaf for leaf in leaves if hasattr(leaf, "nbytes")]
                size = sum(leaf.nbytes for leaf in arrays) if name == "_put" else 0
                self._round[key] += 1, seconds - self._inner.pop(), len(arrays), size
                self._inner[-1] += time.perf_counter() - start

        setattr(owner, name, timed)

    def end_round(self) -> dict[str, np.ndarray]:
        """Returns the steps of the round, and begins another."""
        self.rounds.append(dict(self._round))
        self._round.clear()
        return self.rounds[-1]


def timed_steps(scheduler: Scheduler, device: Device, storage: SharedPages) -> Steps:
    """Returns the steps of the rounds of a scheduler from now on."""
    steps = Steps()
    for name in ("reserve", "cut", "keep", "release"):
        steps.wrap(storage, name, f"pages: {name}")
    for name in ("prefix", "prefill", "insert", "generate", "free"):
        steps.wrap(device, name, f"{name}: Python")
    for owner in (device, device._requests):
        steps.wrap(owner, "_put", "arrays to the device")
    steps.wrap(device, "_run", lambda name, *_: f"dispatch of {name}")
    for name in ("_admit", "_read", "_start", "_launch"):
        steps.wrap(scheduler, name, f"scheduler: {name[1:]}")
    steps.wrap(scheduler, "_deliver", "scheduler: deliver")
    steps.wrap(scheduler._in_flight, "next", "wait for the device")
    return steps


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns the median and the largest of some milliseconds."""
    return {"p50": round(statistics.median(values), 2), "most": round(max(values), 2), "count": len(values)}


def table(rounds: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Returns step -> calls, microseconds (median and largest), arrays and kilobytes of a round."""
    labels = list(dict.fromkeys(label for steps in rounds for label in steps))
    rows = {}
    for label in labels:
        each = np.array([steps.get(label, np.zeros(4)) for steps in rounds])
        calls, seconds, arrays, size = np.median(each, axis=0)
        rows[label] = {
            "calls": float(calls),
            "us": round(seconds * 1e6, 1),
            "most_us": round(each[:, 1].max() * 1e6, 1),
            "arrays": float(arrays),
            "kb": round(size / 1e3, 1),
        }
    return rows


def say_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints a table, without steps that most rounds lack."""
    report.say(f"{title}\n{'step':<28}{'calls':>6}{'us':>10}{'most':>10}{'arrays':>8}{'KB':>9}")
    host = 0.0
    for label, row in rows.items():
        if not row["calls"]:
            continue
        host += row["us"] * (label != "wait for the device")
        print(
            f"{label:<28}{row['calls']:>6.0f}{row['us']:>10.0f}{row['most_us']:>10.0f}"
            f"{row['arrays']:>8.0f}{row['kb']:>9.1f}"
        )
    print(f"{'host':<28}{'':>6}{host:>10.0f}", flush=True)


def without_computations(device: Device) -> None:
    """Replaces the programs of a device by such as take and return the same arrays, and compute nothing."""
    empties: dict[Any, Any] = {}

    def run(name: str, program: Any, *arguments: Any, result: Any, **static: Any) -> Any:
        if isinstance(program, functools.partial):
            program, arguments = program.func, (*program.args, *arguments)
        key = name, *static.items()
        if key not in empties:
            donated = (DONATED[name],) if name in DONATED else ()
            computation = functools.partial(program.__wrapped__, **static)
            empty = functools.partial(_empty, computation, donated)
            empties[key] = jax.jit(empty, donate_argnums=donated)
        return empties[key](*arguments)

    device._run = run  # type: ignore[method-assign]


def _empty(program: Callable[..., Any], donated: tuple[int, ...], *arguments: Any) -> Any:
    """Returns donated arrays and zeros of the shapes that a program returns."""
    given = collections.defaultdict(list)
    for leaf in jax.tree.leaves([arguments[i] for i in donated]):
        given[leaf.shape, leaf.dtype].append(leaf)

    def array(result: Any) -> jax.Array:
        same = given[result.shape, result.dtype]
        return same.pop(0) if same else jnp.zeros(result.shape, result.dtype)

    return jax.tree.map(array, jax.eval_shape(program, *arguments))
