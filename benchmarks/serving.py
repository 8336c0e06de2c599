"""Times the HTTP server under load, with random weights in the shape of a published model.

    python benchmarks/serving.py --output serving.json          Qwen3-8B, 1 to 32 clients, 3 and 4 bits, bf16

For each kind of weights one server runs in this process, as ``grinqh-jax serve`` does, and ``grinqh-jax
bench-serve`` sends requests from another process: a closed loop of clients, prompts of random tokens that
share no prefix, greedy answers. The tokenizer has a word for each token, so each token is text.

Before, the engine alone is timed: the time of a prompt, and of a decode step with each number of answers. The
decode speed under load is the number of tokens over the time that the prompts do not take. ``of_batched`` is
its ratio to the speed of as many rows in ``benchmarks/decode.py`` (``--batched``), or to that of the engine
alone.
"""

import argparse
import dataclasses
import gc
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import report
import tokenizers

from grinqh_jax.benchmarking import load, random_model
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
TIMES = ("time_to_first_event", "time_between_events", "request")


def word_tokenizer(size: int, directory: pathlib.Path) -> Tokenizer:
    """Returns a tokenizer of ``size`` words. It knows those of the prompts of ``bench-serve``."""
    words = list(dict.fromkeys(load.TEXT.split()))
    words = (words + [f"word{i}" for i in range(len(words), size)])[:size]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, directory)


def time_server(kind: str, config: ModelConfig, args: argparse.Namespace, results: report.Report) -> None:
    """Serves a model with graded or bfloat16 weights, and measures it under each load."""
    make = random_model.graded if kind == "graded" else random_model.dense
    targets = random_model.TARGETS if kind == "graded" else None
    context = args.prompt_tokens + args.max_tokens + 64
    with tempfile.TemporaryDirectory() as name, server.bind("127.0.0.1", 0) as bound:
        directory = pathlib.Path(name)
        model = jax.block_until_ready(make(config))
        report.say(f"made {kind} weights")
        tokenizer = word_tokenizer(config.vocab_size, directory)
        generator = Generator(model, tokenizer, GenerationConfig(), targets, directory)
        with Engine(generator, slots=args.slots, max_context=context) as engine:
            report.say("compiled")
            alone = time_engine(kind, engine, args)
            results.fields["engine"].append(alone)
            report.say(json.dumps(alone))
            work = kind, server.url(bound), alone, args, results
            clients = threading.Thread(target=measure, args=work, daemon=True)
            service = Service(args.shape, generator, engine, Limits())
            server.serve(service, bound, on_listening=clients.start)
            clients.join()


def settings(kind: str, args: argparse.Namespace) -> list[float | str]:
    """Returns the bits that requests to a model ask for."""
    return args.bits if kind == "graded" else ["full"]


def rows_of(clients: int, args: argparse.Namespace) -> int:
    """Returns the number of answers that are decoded at once."""
    return min(clients, args.slots)


def time_engine(kind: str, engine: Engine, args: argparse.Namespace) -> dict:
    """Returns the milliseconds of a prompt, and of a decode step by bits and number of answers."""
    rng = random.Random(0)

    def submit(bits, count: int, tokens: int) -> list:
        request = Request(bits=bits, max_tokens=tokens, temperature=0.0, stop_tokens=())
        prompts = [[rng.randrange(2, 60) for _ in range(args.prompt_tokens)] for _ in range(count)]
        return [engine.submit(prompt, request) for prompt in prompts]

    def prompt_ms(count: int) -> float:
        start = time.perf_counter()
        for answer in submit(settings(kind, args)[0], count, 1):
            answer.result()
        return (time.perf_counter() - start) / count * 1e3

    def step_ms(bits, rows: int) -> float:
        # The last answer begins when all others run, and the first of them ends some chunks later.
        *_, last = submit(bits, rows, args.max_tokens)
        arrivals = [(time.perf_counter(), len(piece.tokens)) for piece in last]
        pairs = list(itertools.pairwise(arrivals))
        steady = pairs[1 : len(pairs) - rows] or pairs
        return statistics.median((end - start) / tokens for (start, _), (end, tokens) in steady) * 1e3

    prompt_ms(2)  # The first calls take longer.
    numbers = sorted({rows_of(clients, args) for clients in args.clients})
    steps = {
        str(bits): {rows: round(step_ms(bits, rows), 3) for rows in numbers} for bits in settings(kind, args)
    }
    return {"weights": kind, "prompt_ms": round(prompt_ms(8), 2), "step_ms": steps}


def measure(kind: str, url: str, alone: dict, args: argparse.Namespace, results: report.Report) -> None:
    """Runs ``bench-serve`` for each number of clients and setting, then ends the server."""
    loads = {each: len(settings(each, args)) for each in args.weights}
    share = sum(loads[each] for each in args.weights[: args.weights.index(kind) + 1]) / sum(loads.values())
    batched = json.loads(args.batched.read_text()) if args.batched else None
    try:
        bench(url, settings(kind, args)[0], 2, 2, 16, args)  # The first requests take longer.
        for clients, bits in itertools.product(args.clients, settings(kind, args)):
            if results.out_of_time(f"{kind}, {clients} clients, {bits} bits", share):
                continue
            figures = bench(url, bits, clients, max(args.rounds * clients, 4), args.max_tokens, args)
            row = {"weights": kind, "bits": bits, "clients": clients}
            row |= {name: figures[name] and round(figures[name], 3) for name in FIGURES}
            row |= {name: {key: round(ms, 2) for key, ms in figures[name].items()} for name in TIMES}
            rows = rows_of(clients, args)
            speed = rows / alone["step_ms"][str(bits)][rows] * 1e3
            if batched is not None:
                speed = batched_speed(batched, kind, bits, rows) or speed
            decoding = figures["seconds"] - figures["requests"] * alone["prompt_ms"] / 1e3
            row["decode_tokens_per_second"] = round(figures["tokens"] / decoding, 1)
            row["batched_tokens_per_second"] = round(speed, 1)
            row["of_batched"] = round(figures["tokens"] / decoding / speed, 3)
            results.fields["rows"].append(row)
            results.save()
            report.say(json.dumps(row))
    except Exception as error:
        results.problems.append(f"{kind}: {error}")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # The server drains, and returns.


def batched_speed(batched: dict, kind: str, bits: float | str, rows: int) -> float | None:
    """Returns the tokens per second of all rows in a result of ``decode.py``; None if it has no such row."""
    for shape in batched["shapes"].values():
        for row in shape["decode"]:
            if row["batch"] == rows and row["bits"] == (bits if kind == "graded" else "bf16"):
                return row["tokens_per_second_of_all_rows"]
    return None


def bench(
    url: str, bits: float | str, clients: int, requests: int, tokens: int, args: argparse.Namespace
) -> dict:
    """Returns what ``bench-serve`` prints."""
    sizes = {"prompt-tokens": args.prompt_tokens, "max-tokens": tokens, "requests": requests}
    flags = {"url": url, "bits": bits, "concurrency": clients, **sizes}
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
        default=[8, 1, 16, 4, 32],
        metavar="N",
        help="numbers of clients (default: 8 1 16 4 32)",
    )
    add("--slots", type=int, default=16, metavar="N", help="answers decoded together (default: 16)")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--max-tokens", type=int, default=256, metavar="N", help="tokens of an answer (default: 256)")
    add("--rounds", type=int, default=3, metavar="N", help="requests of each client (default: 3)")
    add("--batched", type=pathlib.Path, metavar="FILE", help="result of benchmarks/decode.py --batch")
    report.add_arguments(parser)
    args = parser.parse_args()
    config = random_model.shape(args.shape)
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    sizes = {"slots": args.slots, "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens}
    results = report.Report(args, shape=random_model.label(args.shape), **sizes, engine=[], rows=[])
    for kind in args.weights:
        time_server(kind, config, args, results)
        gc.collect()  # the weights of the model that ended
    results.finish()


if __name__ == "__main__":
    main()
