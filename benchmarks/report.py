"""Report of a benchmark script: a JSON file that is written after each result, and a time limit."""

import argparse
import concurrent.futures
import datetime
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import matvec

COMPILING_THREADS = 16
START = time.monotonic()


def elapsed() -> float:
    """Returns the seconds since the script imported this module."""
    return time.monotonic() - START


def say(text: str) -> None:
    """Prints a line with the time since the start."""
    print(f"[{elapsed():5.0f}s] {text}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags ``--seconds`` and ``--output``."""
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="start no measurement after S seconds (default: no limit)"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")


class Report:
    """Results of a script.

    Attributes:
      fields: JSON object; the script adds its results.
      problems: One line for each failed check.
    """

    def __init__(self, args: argparse.Namespace, **fields: Any):
        """Makes a report without results.

        Args:
          args: Parsed flags of ``add_arguments``.
          fields: More fields of the JSON object.
        """
        self._seconds, self._output = args.seconds, args.output
        self.problems: list[str] = []
        self.fields: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "versions": {name: matvec.version(name) for name in ("jax", "jaxlib", "numpy")},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            **fields,
            "problems": self.problems,
            "skipped": [],
        }

    def save(self) -> None:
        """Writes the file, if the script has one."""
        self.fields["seconds"] = round(elapsed(), 1)
        if self._output:
            self._output.write_text(json.dumps(self.fields, indent=1) + "\n")

    def out_of_time(self, measurement: str, share: float = 1.0) -> bool:
        """Returns whether a share of the limit has passed; if so, records that ``measurement`` is skipped."""
        if self._seconds is None or elapsed() < share * self._seconds:
            return False
        self.fields["skipped"].append(measurement)
        say(f"out of time: skipped {measurement}")
        self.save()
        return True

    def finish(self) -> None:
        """Writes the file, and exits with an error if a check failed."""
        self.save()
        say("finished")
        if self.problems:
            sys.exit("\n".join(self.problems[:20]))


def compile_all(
    functions: dict, arguments: dict, options: dict | None = None, threads: int = COMPILING_THREADS
) -> dict:
    """Returns the executables of ``compile_in_order`` by keys, when all are compiled."""
    return dict(compile_in_order(functions, arguments, options, threads))


def compile_in_order(
    functions: dict, arguments: dict, options: dict | None = None, threads: int = COMPILING_THREADS
) -> Iterator[tuple[Any, jax.stages.Compiled]]:
    """Compiles functions in threads, and yields each key and executable as soon as those before are ready.

    XLA times the algorithms of a product on the GPU while it compiles, and waits up to 0.1 s for each if
    another thread uses the GPU. So programs with products compile in one thread, or without autotuning.

    Args:
      functions: Functions by keys, jitted or not.
      arguments: Arguments of each function.
      options: Options of XLA.
      threads: Number of threads.
    """

    def lowered() -> Iterator[tuple[Any, Callable[[], jax.stages.Compiled]]]:
        for key, function in functions.items():
            jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
            program = jitted.lower(*arguments[key])
            yield key, functools.partial(program.compile, compiler_options=options)

    return called_in_order(lowered(), threads)


def called_in_order(
    functions: Iterable[tuple[Any, Callable[[], Any]]], threads: int = COMPILING_THREADS
) -> Iterator[tuple[Any, Any]]:
    """Calls functions that compile in threads; yields each key and result as soon as those before are ready.

    The first functions run while the iterator lowers the next ones.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {key: pool.submit(function) for key, function in functions}
        for key, future in futures.items():
            yield key, future.result()


def compile_lowered(lowered: list[Callable[[], None]], threads: int = COMPILING_THREADS) -> None:
    """Calls functions that compile, in threads."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda function: function(), lowered))
