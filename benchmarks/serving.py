"""Times the HTTP server under load, with random weights in the shape of a published model.

    python benchmarks/serving.py --output serving.json          Qwen3-8B, 1 to 32 clients, 3 and 4 bits, bf16

All models are made, and all programs compiled, before the first measurement, both models at once. Then a
server runs in this process, as ``grinqh-jax serve`` does, for each setting: graded at the first bits,
bfloat16, graded at the other bits. ``grinqh-jax bench-serve`` sends requests from another process: a closed
loop of clients, prompts of random tokens that share no prefix, greedy answers. The tokenizer has a word for
each token, so each token is text. The engine of the other model waits meanwhile, and computes nothing.

Before each server, its engine alone is timed: the time of a prompt, of a decode step with each number of
answers, and of a step of 8 answers of which one has a grammar (``step_ms_beside_a_grammar``).

A load begins with all prompts at once and ends with fewer and fewer answers. ``steady`` leaves both out: it
counts whole rounds of answers, from the end of the first answer on, while every client has a request. Its
decode speed is the number of tokens over the time that the prompts do not take. ``of_batched`` is the ratio
to the speed of as many rows in ``benchmarks/decode.py`` (``--batched``), or to that of the engine alone, and
``batched_from`` says which. ``dispatch`` is the time, in milliseconds, in which the host gives the device the
work of a round, while clients are served.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import report
import tokenizers
from serving_figures import Setting, Weights, batched_speed, steady

from grinqh_jax.benchmarking import load, random_model
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.bits import FULL
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.server import run as server
from grinqh_jax.server.limits import Limits
from grinqh_jax.server.service import Service
from grinqh_jax.serving.engine import Engine
from grinqh_jax.text.tokenizer import Tokenizer

FIGURES = ("failed", "requests_per_second", "tokens_per_second", "realised_bits")
LEAST_REQUESTS = 8
SEEDS = itertools.count(1)
TIMES = ("time_to_first_event", "time_between_events", "request")


def word_tokenizer(size: int, directory: pathlib.Path) -> Tokenizer:
    """Returns a tokenizer of ``size`` words. It knows those of the prompts of ``bench-serve``."""
    words = list(dict.fromkeys(load.TEXT.split()))
    words = (words + [f"word{i}" for i in range(len(words), size)])[:size]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, directory)


def settings(args: argparse.Namespace) -> list[Setting]:
    """Returns all settings, the most important ones first."""
    graded = [Setting("graded", bits) for bits in args.bits if "graded" in args.weights]
    dense = [Setting("bf16", FULL)] if "bf16" in args.weights else []
    return [*graded[:1], *dense, *graded[1:]]


def make_engines(
    config: ModelConfig, directory: pathlib.Path, args: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[Weights, tuple[Generator, Engine]]:
    """Makes all models, then compiles the programs of all engines at once; ``stack`` closes the engines."""
    tokenizer = word_tokenizer(config.vocab_size, directory)
    generators: dict[Weights, Generator] = {}
    for weights in args.weights:
        make = random_model.graded if weights == "graded" else random_model.dense
        targets = random_model.TARGETS if weights == "graded" else None
        model = jax.block_until_ready(make(config))
        generators[weights] = Generator(model, tokenizer, GenerationConfig(), targets, directory)
        report.say(f"made {weights} weights")
    context = args.max_context or args.prompt_tokens + args.max_tokens + 64

    def make_engine(weights: Weights) -> Engine:
        engine = Engine(generators[weights], slots=args.slots, max_context=context, grammars=True)
        report.say(f"compiled the programs for {weights} weights")
        return engine

    with concurrent.futures.ThreadPoolExecutor() as pool:
        engines = list(pool.map(make_engine, generators))
    return {
        weights: (generator, stack.enter_context(engine))
        for (weights, generator), engine in zip(generators.items(), engines, strict=True)
    }


def time_server(
    setting: Setting, generator: Generator, engine: Engine, args: argparse.Namespace, results: report.Report
) -> None:
    """Serves a model, and measures the server under each load."""
    if results.out_of_time(f"{setting.weights}, {setting.bits} bits"):
        return
    alone = time_engine(setting, generator.model.config.vocab_size, engine, args)
    results.fields["engine"].append(alone)
    results.save()
    report.say(json.dumps(alone))
    with server.bind("127.0.0.1", 0) as bound:
        work = setting, engine, server.url(bound), alone, args, results
        clients = threading.Thread(target=measure, args=work, daemon=True)
        service = Service(args.shape, generator, engine, Limits())
        server.serve(service, bound, on_listening=clients.start)
        clients.join()


def rows_of(clients: int, args: argparse.Namespace) -> int:
    """Returns the number of answers that are decoded at once."""
    return min(clients, args.slots)


def time_engine(
    setting: Setting, vocab_size: int, engine: Engine, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns the milliseconds of a prompt, and of a decode step by number of answers.

    Those beside a grammar are of answers of which the first has a grammar, so that chunks have one step.
    """
    rng = random.Random(0)

    def submit(count: int, tokens: int, grammars: Sequence[Any] = ()) -> list:
        request = Request(bits=setting.bits, max_tokens=tokens, temperature=0.0, stop_tokens=())
        prompts = [[rng.randrange(2, 60) for _ in range(args.prompt_tokens)] for _ in range(count)]
        each = itertools.zip_longest(prompts, grammars)
        return [engine.submit(prompt, request, grammar=grammar) for prompt, grammar in each]

    def prompt_ms(count: int) -> float:
        start = time.perf_counter()
        for answer in submit(count, 1):
            answer.result()
        return (time.perf_counter() - start) / count * 1e3

    def step_ms(rows: int, tokens: int, grammars: Sequence[Any] = ()) -> float:
        # The last answer begins when all others run, and the first of them ends some chunks later.
        *_, last = submit(rows, tokens, grammars)
        arrivals = [(time.perf_counter(), len(piece.tokens)) for piece in last]
        pairs = list(itertools.pairwise(arrivals))
        steady = pairs[1 : len(pairs) - rows] or pairs
        return statistics.median((end - start) / tokens for (start, _), (end, tokens) in steady) * 1e3

    prompt_ms(2)  # The first calls take longer.
    prompt = round(prompt_ms(8), 2)
    numbers = sorted({rows_of(clients, args) for clients in args.clients})
    steps = {rows: round(step_ms(rows, args.max_tokens), 3) for rows in numbers}
    few, grammar = max(args.max_tokens // 4, 16), AnyText(vocab_size)
    masked = {rows: round(step_ms(rows, few, [grammar]), 3) for rows in numbers if rows in (2, 8)}
    times = {"prompt_ms": prompt, "step_ms": steps, "step_ms_beside_a_grammar": masked}
    return dataclasses.asdict(setting) | times


class AnyText:
    """A grammar of all texts. It costs what a schema costs, but for the time of the mask on the host."""

    def __init__(self, vocab_size: int):
        self._mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)

    def copy(self) -> "AnyText":
        return self

    def allowed(self) -> np.ndarray:
        return self._mask

    def push(self, token: int) -> bool:
        return False


def measure(
    setting: Setting,
    engine: Engine,
    url: str,
    alone: dict,
    args: argparse.Namespace,
    results: report.Report,
) -> None:
    """Runs ``bench-serve`` for each number of clients, then ends the server."""
    batched = json.loads(args.batched.read_text()) if args.batched else None
    try:
        bench(url, setting, 2, 2, 16, args)  # The first requests take longer.
        for clients in args.clients:
            if results.out_of_time(f"{setting.weights}, {setting.bits} bits, {clients} clients"):
                continue
            rows = rows_of(clients, args)
            requests = max(args.rounds * rows, LEAST_REQUESTS)
            with timed_dispatch(engine.scheduler) as dispatched:
                figures = bench(url, setting, clients, requests, args.max_tokens, args)
            row = dataclasses.asdict(setting) | {"clients": clients, "requests": requests}
            row |= {name: figures[name] and round(figures[name], 3) for name in FIGURES}
            row |= {name: {key: round(ms, 2) for key, ms in figures[name].items()} for name in TIMES}
            speed, source = rows / alone["step_ms"][rows] * 1e3, "engine"
            found = batched_speed(batched, setting, rows, args) if batched else None
            if found is not None:
                speed, source = found, "decode.py"
            row["batched_tokens_per_second"] = round(speed, 1)
            row["batched_from"] = source
            p50, p99 = np.percentile(dispatched, (50, 99)) * 1e3
            row["dispatch"] = {"p50": round(p50, 2), "p99": round(p99, 2)}
            row["steady"] = steady(figures["ends"], rows, args.max_tokens, alone["prompt_ms"] / 1e3, speed)
            results.fields["rows"].append(row)
            if figures["failed"]:
                results.problems.append(f"{setting.weights}, {clients} clients: {figures['errors']}")
            results.save()
            report.say(json.dumps(row))
    except Exception as error:
        results.problems.append(f"{setting.weights}, {setting.bits} bits: {error}")
        results.save()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # The server drains, and returns.


@contextlib.contextmanager
def timed_dispatch(scheduler: Scheduler) -> Iterator[list[float]]:
    """Yields a list that gets the seconds that the host takes to dispatch the work of each round."""
    seconds: list[float] = []
    dispatch = scheduler.dispatch

    def timed() -> None:
        start = time.perf_counter()
        dispatch()
        seconds.append(time.perf_counter() - start)

    scheduler.dispatch = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        scheduler.dispatch = dispatch  # type: ignore[method-assign]


def bench(
    url: str, setting: Setting, clients: int, requests: int, tokens: int, args: argparse.Namespace
) -> dict:
    """Returns what ``bench-serve`` prints. No two loads have the same prompts, which would share pages."""
    sizes = {"prompt-tokens": args.prompt_tokens, "max-tokens": tokens, "requests": requests}
    flags = {"url": url, "bits": setting.bits, "concurrency": clients, "seed": next(SEEDS), **sizes}
    command = [sys.executable, "-m", "grinqh_jax", "bench-serve", "--json"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return json.loads(done.stdout)


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
    add(
        "--weights",
        nargs="+",
        default=["graded", "bf16"],
        choices=("graded", "bf16"),
        help="models to serve (default: graded bf16)",
    )
    add("--bits", nargs="+", type=float, default=[3.0, 4.0], metavar="B", help="default: 3 4")
    add(
        "--clients",
        nargs="+",
        type=int,
        default=[1, 8, 16, 32, 4],
        metavar="N",
        help="numbers of clients (default: 1 8 16 32 4)",
    )
    add("--slots", type=int, default=16, metavar="N", help="answers decoded together (default: 16)")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--max-tokens", type=int, default=256, metavar="N", help="tokens of an answer (default: 256)")
    add("--max-context", type=int, metavar="N", help="most tokens of both (default: 64 more than these)")
    add(
        "--rounds",
        type=int,
        default=4,
        metavar="N",
        help=f"requests of a load for each answer decoded at once, at least {LEAST_REQUESTS} (default: 4)",
    )
    add("--batched", type=pathlib.Path, metavar="FILE", help="result of benchmarks/decode.py --batch")
    report.add_arguments(parser)
    args = parser.parse_args()
    config = random_model.shape(args.shape)
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    sizes = {"slots": args.slots, "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens}
    results = report.Report(args, shape=random_model.label(args.shape), **sizes, engine=[], rows=[])
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        engines = make_engines(config, pathlib.Path(directory), args, stack)
        for setting in settings(args):
            time_server(setting, *engines[setting.weights], args, results)
    results.finish()


if __name__ == "__main__":
    main()
