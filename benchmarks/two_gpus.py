"""Compares two GPUs with one, and the ways in which they exchange sums, within a time limit.

    python benchmarks/two_gpus.py --seconds 460 --output two-gpus.jsonl     everything, on two GPUs

Every part runs in a process of its own, so that an exchange that hangs costs its part only, and writes each
result at once as a line of JSON. The parts, in this order:

1. ``probe:kernel``: an exchange by ``pallas_kernels.exchange``: microseconds for the sizes of a decode step,
   and whether the sums are right. ``--probes`` adds XLA's all-reduce (``sum``) and NCCL's (``nccl``).
2. ``probe:norm``: an exchange and the norm after it, in one launch and in two, and whether the bits agree.
3. ``answers``: logits of the bundled model on two GPUs against one, and greedy texts.
4. ``shape``: one part for each shape: tokens/s on two GPUs with each exchange, then on one, with the table of
   a step. Weights are made, and programs compiled, at the same time.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The first GPU holds one model whole and another one's half: 112 GB of Llama-3.1-70B.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

NCCL = "--xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"
"""Option by which XLA adds up over devices by NCCL, not by its own kernel (jax 0.11.2)."""

SHAPES = ("Llama-3.1-70B", "Qwen3-32B", "Qwen3-8B")

ONE = "one GPU"
"""Name of a model on one GPU in the results."""

CONTEXT = 1024
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--output", type=pathlib.Path, default=pathlib.Path("two-gpus.jsonl"), metavar="FILE")
    add("--seconds", type=float, default=460, metavar="S", help="time limit of all parts (default: 460)")
    add("--shapes", nargs="+", default=SHAPES, metavar="NAME", help=f"default: {' '.join(SHAPES)}")
    add("--batch", nargs="+", type=int, default=[1, 8], metavar="N", help="default: 1 8")
    add("--bits", nargs="+", type=float, default=[3, 4], metavar="B", help="default: 3 4")
    add("--tokens", type=int, default=64, metavar="N", help="tokens of a dispatch (default: 64)")
    add("--repeats", type=int, default=4, metavar="N", help="timed runs (default: 4)")
    add("--layers", type=int, metavar="N", help="keep the first N layers of a shape (default: all)")
    add("--probes", nargs="+", default=["kernel", "norm"], choices=("sum", "nccl", "kernel", "norm"))
    add("--exchanges", nargs="+", default=["kernel"], choices=("kernel", "sum"), help="default: kernel")
    add("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        kind, _, name = args.part.partition(":")
        {"probe": probe, "answers": answers, "shape": shape}[kind](args, name)
        return
    limits = {f"probe:{name}": 60.0 for name in args.probes} | {"answers:": 100.0}
    parts = [*limits, *(f"shape:{name}" for name in args.shapes)]
    end = time.monotonic() + args.seconds
    for part in parts:
        limit = min(limits.get(part, args.seconds), end - time.monotonic())
        if limit < 20:
            say(args, part=part, skipped="no time is left")
            continue
        started = time.monotonic()
        ended = run_part(args, part, limit)
        say(args, part=part, seconds=round(time.monotonic() - started, 1), ended=ended)
        if part in ("probe:kernel", "answers:") and ended != "well" and "kernel" in args.exchanges:
            args.exchanges = ["sum"]


def run_part(args, part: str, limit: float) -> str:
    """Runs a part in a process; returns ``well`` or how it ended."""
    own = ["--part", part, "--output", args.output, "--tokens", args.tokens, "--repeats", args.repeats]
    own += ["--bits", *args.bits, "--batch", *args.batch, "--exchanges", *args.exchanges]
    own += [] if args.layers is None else ["--layers", args.layers]
    flags = os.environ.get("XLA_FLAGS", "") + (f" {NCCL}" if part == "probe:nccl" else "")
    command = [sys.executable, __file__, *map(str, own)]
    try:
        code = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"killed after {limit:.0f} s"
    return "well" if code == 0 else f"exit code {code}"


def say(args, **fields) -> None:
    """Writes one result."""
    line = json.dumps(fields) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    with args.output.open("a") as file:
        file.write(line)


def probe(args, name: str) -> None:
    """Times an exchange by itself (``exchange_probes``)."""
    import exchange_probes

    for result in exchange_probes.probe(name):
        say(args, probe=name, **result)


def answers(args, _: str) -> None:
    """Compares two GPUs with one on the bundled model, in float32 at full bits: logits and greedy texts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grinqh_jax.bundled import BUNDLED_MODEL
    from grinqh_jax.decoding.generator import Generator
    from grinqh_jax.decoding.request import Request
    from grinqh_jax.model.flat_model import FlatModel
    from grinqh_jax.sharding.mesh import make_mesh
    from grinqh_jax.sharding.program import on_mesh

    jax.config.update("jax_default_matmul_precision", "highest")
    forward = jax.jit(on_mesh(lambda model, tokens: model.module(tokens)))
    prompts = ["The history of", "A recipe for", "In the morning", "The largest"]
    one = Generator.load(BUNDLED_MODEL, jnp.float32)
    tokens = np.random.default_rng(0).integers(0, one.model.config.vocab_size, (1, 128))
    expected = np.asarray(forward(FlatModel(one.model), tokens))
    request = Request(bits="full", max_tokens=32, temperature=0.0)
    texts = ["".join(one.generate(prompt, request)) for prompt in prompts]
    for exchange in args.exchanges:
        two = Generator.load(BUNDLED_MODEL, jnp.float32, make_mesh("tp=2", one.model.config), exchange)
        logits = np.asarray(forward(FlatModel(two.model), tokens))
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        same = sum("".join(two.generate(p, request)) == t for p, t in zip(prompts, texts, strict=True))
        well = error <= TOLERANCE and same == len(prompts)
        say(args, answers=exchange, relative_error=error, equal_texts=f"{same} of {len(prompts)}", well=well)


def shape(args, name: str) -> None:
    """Times one shape on two GPUs with each exchange, then on one."""
    speeds: dict[tuple, float] = {}
    for key, row in timed(args, name, [on_two_gpus, on_one_gpu]):
        case = row["batch"], row["bits"]
        speeds[key, case] = row["tokens_per_second"]
        if key == ONE:
            times = {e: round(speeds[e, case] / speeds[key, case], 3) for e in args.exchanges}
            say(args, shape=name, batch=row["batch"], bits=row["bits"], times_one_gpu=times)


def on_two_gpus(config, exchanges: list[str]) -> dict:
    """Returns models on two GPUs by the name of their exchange. They share random weights."""
    from flax import traverse_util

    from grinqh_jax.benchmarking import random_model
    from grinqh_jax.model.decoder import Decoder, checkpoint_leaves
    from grinqh_jax.sharding.mesh import make_mesh

    model = random_model.graded(config, mesh=make_mesh("tp=2", config), exchange=exchanges[0])
    tree = traverse_util.unflatten_dict(checkpoint_leaves(model), sep=".")
    cuts = {exchange: dataclasses.replace(model.partition, exchange=exchange) for exchange in exchanges}
    return {name: Decoder.from_tree(config, tree, model.compute_dtype, cut) for name, cut in cuts.items()}


def on_one_gpu(config, _: list[str]) -> dict:
    """Returns a model with random weights on one GPU, by its name in the results."""
    from grinqh_jax.benchmarking import random_model

    return {ONE: random_model.graded(config)}


def timed(args, name: str, makers: list):
    """Times models of one shape, batch by batch; yields the name of a model and a result, which it says.

    Args:
      args: Parsed flags.
      name: Name of the shape.
      makers: Functions of the configuration and of ``args.exchanges`` that return models by name.
    """
    import decode_rows

    from grinqh_jax.benchmarking import measure, random_model

    config = random_model.shape(name)
    if args.layers is not None:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    options = argparse.Namespace(
        contexts=[CONTEXT],
        tokens=args.tokens,
        repeats=args.repeats,
        fixed_thresholds=False,
        profile_contexts=[CONTEXT],
        profile_bits=args.bits[:1],
        hlo=None,
    )
    bandwidth, batches = measure.read_bandwidth(), args.batch
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prepared = pool.map(lambda make: compiled_runs(args, name, config, batches, make), makers)
        runs = [pair for pairs in prepared for pair in pairs.items()]
    for batch in batches:
        for key, run in ((key, run) for (key, rows), run in runs if rows == batch):
            for bits in args.bits:
                (row,) = decode_rows.decode_rows(run.model, name, batch, [bits], options, bandwidth, run)
                say(args, exchange=key, **row)
                yield key, row


def compiled_runs(args, name: str, config, batches: list[int], make) -> dict:
    """Makes models, and compiles their programs at the same time; returns the runs by model and batch."""
    import jax

    from grinqh_jax.benchmarking import random_model
    from grinqh_jax.benchmarking.decode_run import DecodeRun
    from grinqh_jax.decoding.dial import Dial

    started = time.monotonic()
    models = jax.block_until_ready(make(config, args.exchanges))
    say(args, shape=name, models=list(models), weights_seconds=round(time.monotonic() - started, 1))
    started = time.monotonic()
    cases = [(key, batch) for batch in batches for key in models]
    runs = {(key, batch): DecodeRun(models[key], CONTEXT, args.tokens, batch) for key, batch in cases}
    dials = [Dial.create(models[key], random_model.TARGETS, args.bits[:1] * batch) for key, batch in cases]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(DecodeRun.compile, runs.values(), dials))
    seconds = round(time.monotonic() - started, 1)
    say(args, shape=name, models=list(models), programs=len(runs), compile_seconds=seconds)
    return runs


if __name__ == "__main__":
    main()
