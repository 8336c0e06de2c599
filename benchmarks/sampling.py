"""Checks and times the choice of tokens from 151,936 logits on a GPU: the kernel, XLA, and greedy choice.

    python benchmarks/sampling.py --output sampling.json       everything
    python benchmarks/sampling.py --checks                     correctness only
    python benchmarks/sampling.py --rows 1 16                  some numbers of rows

Checks: the kernel's tokens against XLA's for the same seeds (rounding may decide between two tokens, so at
most 1 in 1,000 may differ), and each row alone against all rows together.

Times: kernel time from the profiler, us a choice. The logits are in the order of an output projection, so XLA
also gathers them in the order of the tokens.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import timing

from grinqh_jax.decoding import policy
from grinqh_jax.decoding import sampling as choice
from grinqh_jax.decoding.penalties import Penalties, TokenHistory
from grinqh_jax.decoding.sampling import Sampling

VOCABULARY = 151_936
ROWS = (1, 2, 4, 8, 16)
REPEATS = 20
CHECKED_POSITIONS = 100
DIFFERENT = 1e-3
"""Largest share of tokens that may differ from XLA's."""

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.6, top-k 20, top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top-k 64": {"temperature": 1.0, "top_k": 64},
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "temperature 1, min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "temperature 1, penalties and biases": {"temperature": 1.0, "penalties": True},
    "temperature 0.6, top-k 20, top-p 0.95, penalties and biases": {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "penalties": True,
    },
    "temperature 1, mask": {"temperature": 1.0, "mask": True},
}

Choose = Callable[..., jax.Array]


def draw(rows: int, *, penalties: bool = False, mask: bool = False, **parameters: Any):
    """Returns logits with about the spread of a language model's, sampling parameters and a history."""
    rng = np.random.default_rng(rows)
    logits = jnp.asarray(rng.standard_normal((rows, VOCABULARY)) * 3, jnp.float32)
    sampling, history = Sampling.create(rows, **parameters, seed=1), None
    if penalties:
        rates = jnp.full(rows, 1.1), jnp.full(rows, 0.2), jnp.full(rows, 0.1)
        bias = jnp.asarray(rng.standard_normal((rows, VOCABULARY)), jnp.float32)
        sampling = dataclasses.replace(sampling, penalties=Penalties(*rates), logit_bias=bias)
        history = TokenHistory.of(rng.integers(0, VOCABULARY, (rows, 1024)).tolist(), VOCABULARY)
    if mask:
        words = rng.integers(0, 2**32, (rows, VOCABULARY // 32), dtype=np.uint32)
        sampling = dataclasses.replace(sampling, allowed=jnp.asarray(words))
    return logits, sampling, history


def functions() -> dict[str, Choose]:
    """Returns the ways to choose, ``f(outputs, sampling, positions, history)``, by name."""
    order = np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32)
    token_ids, back = jnp.asarray(order), jnp.asarray(np.argsort(order))

    def kernel(outputs, sampling, positions, history):
        order = {"token_ids": token_ids, "in_order": lambda outputs: outputs[:, back]}
        return choice.choose_tokens(outputs, sampling, positions, policy.GPU, history, **order)

    def xla(outputs, sampling, positions, history):
        logits = choice.adjust(outputs[:, back], sampling, history)
        return choice.sample(logits, sampling, positions, policy.GPU)

    def greedy(outputs, sampling, positions, history):
        return choice.greedy(outputs, token_ids)

    return {
        name: jax.jit(function) for name, function in zip(("kernel", "xla"), (kernel, xla), strict=True)
    } | {"greedy": jax.jit(greedy)}


def check(rows: int, problems: list[str]) -> dict[str, float]:
    """Returns the share of tokens that differ from XLA's, by setting; appends a line for each failure."""
    ways, shares = functions(), {}
    for name, setting in SETTINGS.items():
        logits, sampling, history = draw(rows, **setting)
        different = 0
        for position in range(CHECKED_POSITIONS):
            positions = jnp.full(rows, position, jnp.int32)
            tokens = ways["kernel"](logits, sampling, positions, history)
            different += int((tokens != ways["xla"](logits, sampling, positions, history)).sum())
        shares[name] = different / (rows * CHECKED_POSITIONS)
        if shares[name] > DIFFERENT:
            problems.append(f"{name}: {shares[name]:.4f} of the tokens differ from XLA's")
        last = jax.tree.map(lambda a: a[-1:], (logits, sampling, positions, history))
        if int(ways["kernel"](*last)[0]) != int(tokens[-1]):
            problems.append(f"{name}: the last of {rows} rows has another token alone")
        print(f"{rows:2} rows, {name}: {shares[name]:.4f} of the tokens differ from XLA's", flush=True)
    return shares


def time_all(rows: int) -> list[dict]:
    """Times all settings."""
    results = []
    for name, setting in SETTINGS.items():
        arguments = draw(rows, **setting)
        for way, function in functions().items():

            def call(function=function, arguments=arguments):
                logits, sampling, history = arguments
                return function(logits, sampling, jnp.full(rows, 7, jnp.int32), history)

            durations = timing.profile(call, REPEATS)
            kernels = {kernel: round(sum(us) / REPEATS, 2) for kernel, us in durations.items()}
            total = round(sum(kernels.values()), 2)
            launches = sum(map(len, durations.values())) / REPEATS
            results.append(
                {
                    "rows": rows,
                    "setting": name,
                    "way": way,
                    "us": total,
                    "launches": launches,
                    "kernels": kernels,
                }
            )
            print(f"{rows:2} rows, {name}, {way}: {total:.1f} us in {launches:.0f} launches", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="only check, do not time")
    parser.add_argument("--times", action="store_true", help="only time, do not check")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="N")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    problems: list[str] = []
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: matvec.version(name) for name in ("jax", "jaxlib", "numpy")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "problems": problems,
    }
    if not args.times:
        report["different"] = {rows: check(rows, problems) for rows in args.rows}
    if not args.checks:
        report["times"] = [result for rows in args.rows for result in time_all(rows)]
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
