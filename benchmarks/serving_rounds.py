"""Times what the host does in a round of the decode loop, with and without a prompt.

    python benchmarks/serving_rounds.py                       Qwen3-8B with 3 bits, 1 and 8 answers
    python benchmarks/serving_rounds.py --host                the host alone: programs that compute nothing

There is no server: some answers are decoded, and now and then a prompt comes, whose answer has one token. A
table has, for each step of a round, the number of calls and the microseconds of a round, without the steps
inside it, and the arrays and bytes that it gives to the device. Below are the milliseconds between results:
of a chunk after a chunk, of the first token after a chunk (a prompt on the device, and the time in which the
device waits for the host), and of a chunk after a first token.

Then pieces of prompts are timed alone, one queued behind another, so that the device never waits: with the
default options, and without command buffers. XLA records the launches of a program in command buffers (CUDA
graphs), and updates them when an array has another address than in the call before. ``--trace`` counts these
updates: it lists what the host does longest in some rounds, from the profiler's trace.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_enable_command_buffers_during_profiling=true"

import jax
import jax.numpy as jnp
import numpy as np
import report

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import GPU_ENGINE
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.slots import prompts
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.texts import Received
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.serving.shared_pages import SharedPages
from grinqh_jax.serving.sizes import MOST_STOP_TOKENS, PAGE_SIZE, PIECE

DONATED = {"prefill": 1, "generate": 1, "insert": 0, "free": 0}
"""Number of the argument that each program donates."""

NARROW = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""Widths with ``--host``. Neither widths nor computations change what the host does."""

NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 30}
WARM_UP = 4
"""Prompts that are not counted: programs are loaded, and command buffers recorded."""


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


class Answers:
    """Runs answers on a device, round by round.

    Attributes:
      scheduler: The decode loop.
      steps: Steps of its rounds.
      gaps: Kind of result -> milliseconds since the result before it.
    """

    def __init__(self, device: Device, graded: bool, config: ModelConfig, args: argparse.Namespace):
        storage = SharedPages(device.shape, graded)
        self.scheduler = Scheduler(device, storage, GPU_ENGINE)
        self.steps = timed_steps(self.scheduler, device, storage)
        self.gaps: dict[str, list[float]] = collections.defaultdict(list)
        self._config, self._args = config, args
        self._rng = random.Random(0)
        self._last: tuple[str, float] = ("", 0.0)
        deliver = self.scheduler._deliver

        def noted(arrival: Any) -> None:
            now = time.perf_counter()
            kind = "first token" if arrival.work.is_first else "chunk"
            before, at = self._last
            self.gaps[f"{kind} after {before}"].append((now - at) * 1e3)
            self._last = kind, now
            deliver(arrival)

        self.scheduler._deliver = noted  # type: ignore[method-assign]

    def add(self, ended: Callable[[list[int]], bool] = lambda tokens: False) -> None:
        """Adds a prompt of random tokens, whose answer ends as ``Received`` says."""
        prompt = [self._rng.randrange(self._config.vocab_size) for _ in range(self._args.prompt_tokens)]
        settings = settings_of(self._config, self._args.bits, self._args.context)
        self.scheduler.add(Job(prompt, settings, Received(ended)))

    def round(self) -> dict[str, np.ndarray]:
        """Runs a round; returns its steps."""
        self.scheduler.step()
        return self.steps.end_round()


def without_computations(device: Device) -> None:
    """Replaces the programs of a device by such as take and return the same arrays, and compute nothing."""
    empties: dict[Any, Any] = {}

    def run(name: str, program: Any, *arguments: Any, result: Any, **static: Any) -> Any:
        if isinstance(program, functools.partial):
            program, arguments = program.func, (*program.args, *arguments)
        key = name, *static.items()
        if key not in empties:
            donated = (DONATED[name],) if name in DONATED else ()
            empty = functools.partial(_empty, functools.partial(program, **static), donated)
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


def settings_of(config: ModelConfig, bits: float, limit: int) -> Settings:
    """Returns the settings of a greedy request, as an engine has them."""
    sampling: Any = sampling_rows(1, config.vocab_size, temperature=0.0)
    return Settings.of_request(sampling, bits, (), limit, MOST_STOP_TOKENS)


def make_device(model: Decoder, dial: Dial | None, args: argparse.Namespace) -> Device:
    """Returns a device whose programs are compiled: those of greedy answers."""
    context = args.prompt_tokens + args.context
    shape = Shape(
        slots=args.slots,
        max_context=context,
        page_size=PAGE_SIZE,
        piece=PIECE,
        num_pages=args.slots * -(-context // PAGE_SIZE),
        stop_tokens=MOST_STOP_TOKENS,
        grammars=True,
    )
    config, graded = model.config, dial is not None
    device = Device(model, dial, shape, GPU_ENGINE, settings_of(config, args.bits, 1))
    numbers = {min(args.slots, 1 << (rows - 1).bit_length()) for rows in args.answers}
    kept = {rows for count in numbers for rows in (count, min(2 * count, args.slots))}
    device.step_shapes = [step for step in device.step_shapes if step.texts in kept | {args.slots}]
    prompt = Job([0] * args.prompt_tokens, settings_of(config, args.bits, 1), Received())
    widths = {piece.tokens.shape[1] for piece in SharedPages(shape, graded).cut(prompt, 0)}
    if args.host:
        without_computations(device)
        return device
    Programs().compile(lowerings(device, widths, prompt.settings, [(True, False)]))
    return device


def run_answers(answers: Answers, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of rounds with ``count`` answers, with and without a prompt."""
    for _ in range(count):
        answers.add()
    while answers.scheduler.waiting or answers.scheduler.reading:
        answers.round()
    kinds: dict[str, list[dict[str, np.ndarray]]] = {"without a prompt": [], "with a prompt": []}
    for prompt in range(WARM_UP + args.prompts):
        if prompt == WARM_UP:
            answers.gaps.clear()
        for kind, rounds in kinds.items():
            if kind == "with a prompt":
                answers.add(lambda tokens: True)
            steps = answers.round()
            if prompt >= WARM_UP:
                rounds.append(steps)
        answers.round()  # The answer of the prompt ends.
        answers.round()
    for job in list(answers.scheduler.decoding.values()):
        answers.scheduler.cancel(job)
    while not answers.scheduler.idle:
        answers.round()
    gaps = {kind: percentiles(gaps) for kind, gaps in answers.gaps.items()}
    return {"answers": count, "gaps_ms": gaps, "rounds": {kind: table(each) for kind, each in kinds.items()}}


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


def time_pieces(device: Device, args: argparse.Namespace, graded: bool, repeats: int = 8) -> Iterator[dict]:
    """Yields the milliseconds of the pieces of a prompt on the device, and those of the host."""
    job = Job([1] * args.prompt_tokens, settings_of(device._config, args.bits, 1), Received())
    pieces = list(SharedPages(device.shape, graded).cut(job, 0))
    run_model = device._run_model
    for name, options in (("default", {}), ("no command buffers", NO_GRAPHS)):
        programs: dict[int, Any] = {}

        def run(key: str, program: Any, *arguments: Any, options=options, programs=programs, **rest: Any):
            if program is not prompts.prefill or not options:
                return run_model(key, program, *arguments, **rest)
            arguments = device._model, *arguments
            width = arguments[3].shape[1]
            if width not in programs:
                programs[width] = program.lower(*arguments).compile(compiler_options=options)
            return programs[width](*arguments)

        device._run_model = run  # type: ignore[method-assign]
        seconds: list[float] = []
        host: list[float] = []
        for _ in range(3):
            device.wait()
            start = time.perf_counter()
            for _ in range(repeats):
                prefix = device.prefix([0], 0)
                for piece in pieces:
                    prefix = device.prefill(prefix, piece, job.settings)
            host.append((time.perf_counter() - start) / repeats)
            jax.block_until_ready(prefix.logits)
            seconds.append((time.perf_counter() - start) / repeats)
        device._run_model = run_model  # type: ignore[method-assign]
        yield {
            "options": name,
            "pieces": [int(piece.lengths[0]) for piece in pieces],
            "prompt_ms": round(min(seconds) * 1e3, 2),
            "host_ms": round(min(host) * 1e3, 2),
        }


def traced(answers: Answers, prompts_: int, largest: int = 30) -> list[dict[str, Any]]:
    """Returns what the host did longest in rounds with a prompt each: name, calls and ms of a round."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(prompts_):
                answers.add(lambda tokens: True)
                answers.round()
            while not answers.scheduler.idle:
                answers.round()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        total: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for plane in data.planes:
            for line in plane.lines if plane.name.startswith("/host:CPU") else ():
                for event in line.events:
                    name = event.name.split("#")[0]
                    total[name][0] += 1
                    total[name][1] += event.duration_ns / 1e6
    ranked = sorted(total.items(), key=lambda item: -item[1][1])[:largest]
    return [
        {"event": name, "calls": round(count / prompts_, 1), "ms": round(ms / prompts_, 3)}
        for name, (count, ms) in ranked
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--shape", default="Qwen3-8B", metavar="NAME", help="published shape (default: Qwen3-8B)")
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--host", action="store_true", help="time the host alone, on any machine")
    add("--weights", default="graded", choices=("graded", "bf16"), help="default: graded")
    add("--bits", type=float, default=3.0, metavar="B", help="default: 3")
    add("--answers", nargs="+", type=int, default=[1, 8], metavar="N", help="running answers (default: 1 8)")
    add("--slots", type=int, default=16, metavar="N", help="default: 16")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    add("--prompts", type=int, default=10, metavar="N", help="counted rounds with a prompt (default: 10)")
    add("--trace", action="store_true", help="list what the host does longest, too")
    report.add_arguments(parser)
    args = parser.parse_args()
    args.context = 16 * 5 * (WARM_UP + args.prompts) + 64
    fields = random_model.hf_configs()[args.shape] | (NARROW if args.host else {})
    if args.layers:
        fields["num_hidden_layers"] = args.layers
    config, graded = ModelConfig.from_hf(fields), args.weights == "graded"
    results = report.Report(args, shape=args.shape, host_alone=args.host, answers=[], pieces=[])
    model = jax.block_until_ready((random_model.graded if graded else random_model.dense)(config))
    dial = Dial.create(model, random_model.TARGETS, np.array([args.bits])) if graded else None
    report.say(f"made {args.weights} weights")
    device = make_device(model, dial, args)
    report.say("compiled the programs")
    with contextlib.ExitStack() as stack:
        answers = Answers(device, graded, config, args)
        stack.callback(answers.scheduler.close)
        for count in args.answers:
            if results.out_of_time(f"{count} answers"):
                continue
            figures = run_answers(answers, count, args)
            results.fields["answers"].append(figures)
            for kind, rows in figures["rounds"].items():
                say_table(f"a round {kind}, {count} answers", rows)
            report.say(json.dumps(figures["gaps_ms"]))
            results.save()
        if args.trace and not results.out_of_time("trace"):
            results.fields["trace"] = traced(answers, 8)
            for event in results.fields["trace"]:
                print(f"{event['event'][:70]:<72}{event['calls']:>8.1f}{event['ms']:>10.3f}", flush=True)
            results.save()
    if not args.host and not results.out_of_time("pieces"):
        for row in time_pieces(device, args, graded):
            results.fields["pieces"].append(row)
            report.say(json.dumps(row))
            results.save()
    results.finish()


if __name__ == "__main__":
    main()
