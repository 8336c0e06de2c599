"""Compares two GPUs with one, and the ways in which they exchange sums, within a time limit.

    python benchmarks/two_gpus.py --seconds 460 --output two-gpus.jsonl     everything, on two GPUs

Every part runs in a process of its own, so that an exchange that hangs costs its part only, and writes each
result at once as a line of JSON. The parts, in this order:

1. ``probe``: one exchange by XLA's all-reduce, which is a kernel over peer memory by default (jax 0.11.2), by
   NCCL, and by the kernel of ``pallas_kernels.exchange``: microseconds for the sizes of a decode step, and
   whether the sums are right.
2. ``answers``: logits of the bundled model on two GPUs against one, and greedy texts.
3. One part for each shape: tokens/s on one GPU, and on two with each exchange, with the table of a step.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

NCCL = "--xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"
"""Option by which XLA adds up over devices by NCCL, not by its own kernel (jax 0.11.2)."""

SHAPES = ("Qwen3-8B", "Llama-3.1-70B", "Qwen3-32B")
SIZES = ((1, 4096), (8, 4096), (1, 8192), (8, 8192))
"""Rows and features of the sums of a decode step."""

ADDED = (1, 2, -3) * 5
"""Numbers added after the exchanges of a step of the probe's loop. No two neighbours add up to 0."""

STEPS = 64
"""Steps of the probe's loop."""

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
    add("--exchanges", nargs="+", default=["sum", "kernel", "gather"], help=argparse.SUPPRESS)
    add("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        kind, _, name = args.part.partition(":")
        {"probe": probe, "answers": answers, "shape": shape}[kind](args, name)
        return
    parts = ["probe:sum", "probe:nccl", "probe:kernel", "answers:"]
    limits = dict.fromkeys(parts, 60.0) | {"answers:": 100.0}
    end = time.monotonic() + args.seconds
    exchanges, results = list(args.exchanges), {}
    for part in parts + [f"shape:{name}" for name in args.shapes]:
        limit = min(limits.get(part, args.seconds), end - time.monotonic())
        if limit < 20:
            say(args, part=part, skipped="no time is left")
            continue
        started = time.monotonic()
        results[part] = run_part(args, part, exchanges, limit)
        say(args, part=part, seconds=round(time.monotonic() - started, 1), ended=results[part])
        if part == "probe:kernel" and results[part] != "well" and "kernel" in exchanges:
            exchanges.remove("kernel")


def run_part(args, part: str, exchanges: list[str], limit: float) -> str:
    """Runs a part in a process; returns ``well`` or how it ended."""
    own = ["--part", part, "--output", args.output, "--tokens", args.tokens, "--repeats", args.repeats]
    own += ["--batch", *args.batch, "--bits", *args.bits, "--exchanges", *exchanges]
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
    line = json.dumps(fields)
    print(line, flush=True)
    with args.output.open("a") as file:
        file.write(line + "\n")


def loop_of_exchanges(mesh, name: str, rows: int, features: int, steps: int):
    """Returns a jitted function that exchanges ``[2, rows, features]`` again and again.

    After the first exchange each device has the mean of both parts. Each exchange is followed by an addition
    of one of ``ADDED``, so that results differ from those of the exchanges before.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from pallas_kernels import Activations
    from pallas_kernels.exchange import Mailbox

    def step(_, state):
        mailbox, x = state
        box = None if mailbox is None else mailbox.referenced()
        for added in ADDED:
            parts = Activations.sums(jnp.stack([0.25 * x, 0.25 * x]), features)
            parts = parts.summed_across("tp") if box is None else box.summed(parts)
            x = parts.partials[0] + added
        return None if box is None else box.frozen(), x

    def exchanged(x):
        mailbox = Mailbox.open(2, rows, features) if name == "kernel" else None
        return jax.lax.fori_loop(0, steps, step, (mailbox, x[0]))[1][None]

    cut = PartitionSpec("tp")
    return jax.jit(jax.shard_map(exchanged, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))


def probe(args, name: str) -> None:
    """Times an exchange in a loop on the devices, and compares the sums with those of the host."""
    import jax
    import numpy as np
    import timing

    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    for rows, features in SIZES:
        x = np.random.default_rng(0).standard_normal((2, rows, features)).astype(np.float32)
        expected = np.float32(0.5) * x[0] + np.float32(0.5) * x[1]
        for added in ADDED * STEPS:
            expected = expected + np.float32(added)
        program = loop_of_exchanges(mesh, name, rows, features, STEPS)
        results = [np.asarray(program(x)) for _ in range(20)]
        started = time.perf_counter()
        jax.block_until_ready([program(x) for _ in range(20)])
        each = (time.perf_counter() - started) / (20 * STEPS * len(ADDED))
        kernels = timing.profile(functools.partial(program, x), 1)
        say(
            args,
            probe=name,
            rows=rows,
            features=features,
            us=round(1e6 * each, 2),
            # All bits: the order of two numbers does not matter.
            wrong_runs=sum(not (result == expected).all() for result in results),
            kernels_us={kernel[:60]: round(float(np.mean(us)), 2) for kernel, us in kernels.items()},
        )


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
        if exchange == "gather":  # Tests on CPUs cover it, and time is short.
            continue
        two = Generator.load(BUNDLED_MODEL, jnp.float32, make_mesh("tp=2", one.model.config), exchange)
        logits = np.asarray(forward(FlatModel(two.model), tokens))
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        same = sum("".join(two.generate(p, request)) == t for p, t in zip(prompts, texts, strict=True))
        well = error <= TOLERANCE and same == len(prompts)
        say(args, answers=exchange, relative_error=error, equal_texts=f"{same} of {len(prompts)}", well=well)


def shape(args, name: str) -> None:
    """Times one shape on one GPU and on two, batch by batch. All programs of a batch compile together."""
    import decode
    import jax
    from flax import traverse_util

    from grinqh_jax.benchmarking import measure, random_model
    from grinqh_jax.benchmarking.decode_run import DecodeRun
    from grinqh_jax.decoding.dial import Dial
    from grinqh_jax.model.decoder import Decoder, checkpoint_leaves
    from grinqh_jax.sharding.mesh import make_mesh

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
    bandwidth = measure.read_bandwidth()
    started = time.monotonic()
    two = random_model.graded(config, mesh=make_mesh("tp=2", config), exchange=args.exchanges[0])
    tree = traverse_util.unflatten_dict(checkpoint_leaves(two), sep=".")
    models = {"one": jax.block_until_ready(random_model.graded(config))}
    for exchange in args.exchanges:
        cut = dataclasses.replace(two.partition, exchange=exchange)
        models[exchange] = Decoder.from_tree(config, tree, two.compute_dtype, cut)
    say(args, shape=name, weights_seconds=round(time.monotonic() - started, 1))
    speeds: dict[tuple, float] = {}
    for batch in args.batch:
        started = time.monotonic()
        # All but the gather, which is of interest for one row only.
        chosen = {key: model for key, model in models.items() if batch == 1 or key != "gather"}
        runs = {key: DecodeRun(model, CONTEXT, args.tokens, batch) for key, model in chosen.items()}
        dials = [Dial.create(model, random_model.TARGETS, args.bits[:1] * batch) for model in chosen.values()]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(DecodeRun.compile, runs.values(), dials))
        say(args, shape=name, batch=batch, compile_seconds=round(time.monotonic() - started, 1))
        for key, run in runs.items():
            for row in decode.decode_rows(models[key], name, batch, args.bits, options, bandwidth, run):
                case = batch, row["bits"]
                speeds.setdefault(case, row["tokens_per_second"])  # One GPU comes first.
                ratio = row["tokens_per_second"] / speeds[case]
                say(args, exchange=None if key == "one" else key, times_one_gpu=round(ratio, 3), **row)


if __name__ == "__main__":
    main()
