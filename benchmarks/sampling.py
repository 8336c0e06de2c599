"""Checks and times the choice of tokens from 151,936 logits on a GPU: the kernel, XLA, and greedy choice.

    python benchmarks/sampling.py --output sampling.json       everything
    python benchmarks/sampling.py --checks                     correctness only
    python benchmarks/sampling.py --rows 1 16                  some numbers of rows

Checks: the kernel's tokens against XLA's for the same seeds (rounding may decide between two tokens, so at
most 1 in 1,000 may differ), and each row alone against all rows together.

All programs compile in parallel. Each number of rows is checked and then timed.

Times: kernel time from the profiler, us a choice, the mean of several positions, because top-p takes longer
where the noise favours tokens that it rejects. The logits are in the order of an output projection, so XLA
also gathers them in the order of the tokens.
"""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import report as reports
import timing
from report import compile_all, say

from grinqh_jax.decoding import policy
from grinqh_jax.decoding import sampling as choice
from grinqh_jax.decoding.penalties import Penalties, TokenHistory
from grinqh_jax.decoding.sampling import Sampling

VOCABULARY = 151_936
ROWS = (1, 16, 4, 8, 2)
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
Programs = dict[tuple[int, str, str], Choose]
"""Programs by number of rows, structure of the parameters, and name of the way."""


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

    return {"kernel": kernel, "xla": xla, "greedy": greedy}


def structure(arguments) -> str:
    """Returns the structure of sampling parameters. Settings of one structure share programs."""
    return str(jax.tree.structure(arguments))


def compiled_programs(rows_list: list[int]) -> Programs:
    """Compiles all ways for all settings in parallel."""
    to_compile, arguments = {}, {}
    for rows in rows_list:
        for setting in SETTINGS.values():
            logits, sampling, history = drawn = draw(rows, **setting)
            for way, function in functions().items():
                key = rows, structure(drawn), way
                to_compile[key] = function
                arguments[key] = logits, sampling, jnp.zeros(rows, jnp.int32), history
    return compile_all(to_compile, arguments)


def check(rows: int, programs: Programs, report: reports.Report) -> None:
    """Records the share of tokens that differ from XLA's, by setting, and a problem for each failure."""
    shares = report.fields["different"][rows] = {}
    for name, setting in SETTINGS.items():
        if report.out_of_time(f"check of {rows} rows, {name}"):
            continue
        logits, sampling, history = drawn = draw(rows, **setting)
        kernel, xla = (programs[rows, structure(drawn), way] for way in ("kernel", "xla"))
        different = []
        for position in range(CHECKED_POSITIONS):  # The device counts, so the host does not wait.
            positions = np.full(rows, position, np.int32)
            tokens = kernel(logits, sampling, positions, history)
            different.append((tokens != xla(logits, sampling, positions, history)).sum())
        shares[name] = sum(map(int, different)) / (rows * CHECKED_POSITIONS)
        if shares[name] > DIFFERENT:
            report.problems.append(f"{rows} rows, {name}: {shares[name]:.4f} of the tokens differ from XLA's")
        last = jax.tree.map(lambda a: a[-1:], (logits, sampling, positions, history))
        if int(programs[1, structure(drawn), "kernel"](*last)[0]) != int(tokens[-1]):
            report.problems.append(f"{name}: the last of {rows} rows has another token alone")
        say(f"{rows:2} rows, {name}: {shares[name]:.4f} of the tokens differ from XLA's")
    report.save()


def time_all(rows: int, programs: Programs, report: reports.Report) -> None:
    """Times all settings."""
    for name, setting in SETTINGS.items():
        drawn = draw(rows, **setting)
        for way in functions():
            if report.out_of_time(f"{rows} rows, {name}, {way}"):
                continue
            function = programs[rows, structure(drawn), way]
            positions = itertools.cycle([jnp.full(rows, i, jnp.int32) for i in range(REPEATS)])

            def choose(function=function, arguments=drawn, positions=positions):
                logits, sampling, history = arguments
                return function(logits, sampling, next(positions), history)

            durations = timing.profile(choose, REPEATS)
            kernels = {kernel: round(sum(us) / REPEATS, 2) for kernel, us in durations.items()}
            total = round(sum(kernels.values()), 2)
            launches = sum(map(len, durations.values())) / REPEATS
            fields = {"us": total, "launches": launches, "kernels": kernels}
            report.fields["times"].append({"rows": rows, "setting": name, "way": way, **fields})
            say(f"{rows:2} rows, {name}, {way}: {total:.1f} us in {launches:.0f} launches")
            report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="only check, do not time")
    parser.add_argument("--times", action="store_true", help="only time, do not check")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="N")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, different={}, times=[])
    # Rows are also checked alone, which takes the programs of one row.
    rows_list = args.rows if args.times or 1 in args.rows else [1, *args.rows]
    start = reports.elapsed()
    programs = compiled_programs(rows_list)
    say(f"compiled {len(programs)} programs in {reports.elapsed() - start:.0f} s")
    for rows in args.rows:
        if not args.times:
            check(rows, programs, report)
        if not args.checks:
            time_all(rows, programs, report)
    report.finish()


if __name__ == "__main__":
    main()
