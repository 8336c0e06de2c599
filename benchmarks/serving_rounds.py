"""Times what the host does in a round of the decode loop, with and without a prompt.

    python benchmarks/serving_rounds.py                       Qwen3-8B with 3 bits, 1 and 8 answers
    python benchmarks/serving_rounds.py --host                the host alone: programs that compute nothing

There is no server: some answers are decoded, and now and then a prompt comes, whose answer has one token. A
table has, for each step of a round, the number of calls and the microseconds of a round, without the steps
inside it, and the arrays and bytes that it gives to the device. Below are the milliseconds between results:
of a chunk after a chunk, of the first token after a chunk (a prompt's last prefill chunk on the device, and
the time in which the device waits for the host), and of a chunk after a first token. The rounds are those
that read the first prefill chunk of a prompt, and those before.

Prompts are also timed alone, one queued behind another, so that the device never waits.

Programs of prompts have no command buffers (``programs.LAUNCHED_ONE_BY_ONE``). All measurements are made
again with command buffers, XLA's default. ``--trace`` lists what the host does longest in some rounds, from
the profiler's trace: ``command_buffer::update`` are launches that are recorded again.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import random
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_enable_command_buffers_during_profiling=true"
)

import jax
import numpy as np
import report
from serving_steps import percentiles, say_table, table, timed_steps, without_computations

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import GPU_ENGINE
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.texts import Received
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.serving.shared_pages import SharedPages
from grinqh_jax.serving.sizes import MOST_STOP_TOKENS, PAGE_SIZE, PREFILL_CHUNK

NARROW = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
"""Widths with ``--host``. Neither widths nor computations change what the host does."""

COMMAND_BUFFERS = {"xla_gpu_graph_min_graph_size": 5}
"""XLA's default."""

WARM_UP = 4
"""Prompts that are not counted: programs are loaded, and command buffers recorded."""


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


def settings_of(config: ModelConfig, bits: float, limit: int) -> Settings:
    """Returns the settings of a greedy request, as an engine has them."""
    sampling: Any = sampling_rows(1, config.vocab_size, temperature=0.0)
    return Settings.of_request(sampling, bits, (), limit, MOST_STOP_TOKENS)


class CommandBuffers:
    """Programs of prompts with command buffers.

    Attributes:
      on: Whether the device runs them.
    """

    def __init__(self):
        self.on = False
        self._programs: dict[Any, Any] = {}

    def install(self, device: Device) -> None:
        """Lets a device run the programs while ``on``."""
        self._run = device._run
        device._run = self._call  # type: ignore[method-assign]

    def lowering(self, key: Any, lowering: Callable[[], Any]) -> Any:
        """Returns a lowered program that is remembered once it is compiled."""
        lowered = lowering()

        def compile() -> None:
            self._programs[key] = lowered.compile(compiler_options=COMMAND_BUFFERS)

        return types.SimpleNamespace(compile=compile)

    def _call(self, name: str, program: Any, *arguments: Any, **rest: Any) -> Any:
        if not self.on or name not in ("prefill", "insert"):
            return self._run(name, program, *arguments, **rest)
        leaves, structure = jax.tree.flatten(arguments)
        sizes = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
        model = program.args if isinstance(program, functools.partial) else ()
        static = (item for item in rest.items() if item[0] != "result")
        return self._programs[name, structure, sizes, *static](*model, *arguments)


def make_device(
    model: Decoder, dial: Dial | None, args: argparse.Namespace
) -> tuple[Device, CommandBuffers | None]:
    """Returns a device whose programs for greedy answers are compiled, and those with command buffers."""
    context = args.max_context or args.prompt_tokens + args.context
    shape = Shape(
        slots=args.slots,
        max_context=context,
        page_size=PAGE_SIZE,
        prefill_chunk=PREFILL_CHUNK,
        num_pages=args.slots * -(-context // PAGE_SIZE),
        stop_tokens=MOST_STOP_TOKENS,
        grammars=True,
    )
    device = Device(model, dial, shape, GPU_ENGINE, settings_of(model.config, args.bits, 1))
    if args.host:
        without_computations(device)
        return device, None
    buffers = CommandBuffers()
    # A prompt comes to answers that run, so there is one more.
    kept = {args.slots} | {
        rows for count in args.answers for rows in (programs_for(count), programs_for(count + 1))
    }
    device.step_shapes = [step for step in device.step_shapes if step.texts in kept]
    prompt = Job([0] * args.prompt_tokens, settings_of(model.config, args.bits, 1), Received())
    widths = {bucket.tokens.shape[1] for bucket in SharedPages(shape, device.graded).cut(prompt, 0)}
    programs = lowerings(device, widths, prompt.settings, [(True, False)])

    for key, lowering in list(programs.items()):
        if key[0] in ("prefill", "insert"):
            programs["command buffers", key] = functools.partial(buffers.lowering, key, lowering)
    Programs().compile(programs)
    buffers.install(device)
    return device, buffers


def programs_for(rows: int) -> int:
    """Returns the number of rows of the program that decodes some answers."""
    return 1 << (rows - 1).bit_length()


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
        while answers.scheduler.reading:  # a prompt of several prefill chunks
            answers.round()
        answers.round()  # The answer of the prompt ends.
        answers.round()
    gaps = {kind: percentiles(gaps) for kind, gaps in answers.gaps.items()}
    for job in list(answers.scheduler.decoding.values()):
        answers.scheduler.cancel(job)
    while not answers.scheduler.idle:
        answers.round()
    return {"answers": count, "gaps_ms": gaps, "rounds": {kind: table(each) for kind, each in kinds.items()}}


def time_prompts(device: Device, args: argparse.Namespace, repeats: int = 8) -> dict[str, Any]:
    """Returns the milliseconds of a prompt on the device, and those of the host.

    The host takes longer when the device has so much to do that its queue is full: ``first_host_ms`` is the
    time for the first prompt, whose device has nothing else to do.
    """
    job = Job([1] * args.prompt_tokens, settings_of(device._config, args.bits, 1), Received())
    buckets = list(SharedPages(device.shape, device.graded).cut(job, 0))
    seconds: list[float] = []
    host: list[float] = []
    first: list[float] = []
    for _ in range(3):
        device.wait()
        start = time.perf_counter()
        for number in range(repeats):
            prefix = device.prefix([0], 0)
            for bucket in buckets:
                prefix = device.prefill(prefix, bucket, job.settings)
            if number == 0:
                first.append(time.perf_counter() - start)
        host.append((time.perf_counter() - start) / repeats)
        jax.block_until_ready(prefix.logits)
        seconds.append((time.perf_counter() - start) / repeats)
    return {
        "buckets": [int(bucket.lengths[0]) for bucket in buckets],
        "prompt_ms": round(min(seconds) * 1e3, 2),
        "host_ms": round(min(host) * 1e3, 2),
        "first_host_ms": round(min(first) * 1e3, 2),
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
                    if name.startswith("$"):  # a Python function
                        continue
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
    add(
        "--shape",
        default="Qwen3-8B",
        metavar="NAME_OR_DIR",
        help="published shape, or directory of a model (default: Qwen3-8B)",
    )
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--host", action="store_true", help="time the host alone, on any machine")
    add("--weights", default="graded", choices=("graded", "bf16"), help="default: graded")
    add("--bits", type=float, default=3.0, metavar="B", help="default: 3")
    add("--answers", nargs="+", type=int, default=[1, 8], metavar="N", help="running answers (default: 1 8)")
    add("--slots", type=int, default=16, metavar="N", help="default: 16")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    add("--prompts", type=int, default=10, metavar="N", help="counted rounds with a prompt (default: 10)")
    add("--max-context", type=int, metavar="N", help="most tokens of a text (default: as many as needed)")
    add("--trace", action="store_true", help="list what the host does longest, too")
    report.add_arguments(parser)
    args = parser.parse_args()
    rounds = 4 + -(-args.prompt_tokens // PREFILL_CHUNK)
    args.context = 16 * rounds * (WARM_UP + args.prompts) + 64
    fields = random_model.hf_configs().get(args.shape) or read_object(
        pathlib.Path(args.shape) / "config.json"
    )
    fields |= NARROW if args.host else {}
    config, graded = ModelConfig.from_hf(fields), args.weights == "graded"
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    results = report.Report(args, shape=random_model.label(args.shape), host_alone=args.host, runs=[])
    model = jax.block_until_ready((random_model.graded if graded else random_model.dense)(config))
    dial = Dial.create(model, random_model.TARGETS, np.array([args.bits])) if graded else None
    report.say(f"made {args.weights} weights")
    device, buffers = make_device(model, dial, args)
    report.say("compiled the programs")
    answers = Answers(device, graded, config, args)
    measure("launched one by one", answers, device, args, results)
    if buffers is not None:
        buffers.on = True
        measure("command buffers", answers, device, args, results)
    answers.scheduler.close()
    results.finish()


def measure(
    name: str, answers: Answers, device: Device, args: argparse.Namespace, results: report.Report
) -> None:
    """Takes all measurements, and prints each as it comes."""
    measured: dict[str, Any] = {"prompts": name, "answers": []}
    results.fields["runs"].append(measured)
    for count in args.answers:
        if results.out_of_time(f"{name}, {count} answers"):
            continue
        figures = run_answers(answers, count, args)
        measured["answers"].append(figures)
        for kind, rows in figures["rounds"].items():
            say_table(f"{name}: a round {kind}, {count} answers", rows)
        report.say(json.dumps(figures["gaps_ms"]))
        results.save()
    if not args.host and not results.out_of_time(f"{name}, prompts alone"):
        measured["prompts_alone"] = time_prompts(device, args)
        report.say(json.dumps(measured["prompts_alone"]))
        results.save()
    if args.trace and not results.out_of_time(f"{name}, trace"):
        measured["trace"] = traced(answers, 3)
        for event in measured["trace"]:
            print(f"{event['event'][:70]:<72}{event['calls']:>8.1f}{event['ms']:>10.3f}", flush=True)
        results.save()


if __name__ == "__main__":
    main()
