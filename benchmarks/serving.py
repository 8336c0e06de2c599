"""Times the HTTP server under load, with random weights in the shape of a published model.

    python benchmarks/serving.py --output serving.json          Qwen3-8B, 1 to 32 clients, 3 and 4 bits, bf16

For each kind of weights one server runs in this process, as ``grinqh-jax serve`` does, and ``grinqh-jax
bench-serve`` sends requests from another process: a closed loop of clients, prompts of random tokens that
share no prefix, greedy answers. The tokenizer has a word for each token, so each token is text. The first
load of a server is not measured.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import report
import tokenizers

from grinqh_jax.benchmarking import load, random_model
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.generator import Generator
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
            url = server.url(bound)
            clients = threading.Thread(target=measure, args=(kind, url, args, results), daemon=True)
            service = Service(args.shape, generator, engine, Limits())
            server.serve(service, bound, on_listening=clients.start)
            clients.join()


def measure(kind: str, url: str, args: argparse.Namespace, results: report.Report) -> None:
    """Runs ``bench-serve`` for each number of clients and setting, then ends the server."""
    settings = args.bits if kind == "graded" else ["full"]
    try:
        bench(url, settings[0], 2, args)  # The first calls load kernels.
        for clients, bits in itertools.product(args.clients, settings):
            if results.out_of_time(f"{kind}, {clients} clients, {bits} bits"):
                continue
            figures = bench(url, bits, clients, args)
            row = {"weights": kind, "bits": bits, "clients": clients}
            row |= {name: figures[name] and round(figures[name], 3) for name in FIGURES}
            row |= {name: {key: round(ms, 2) for key, ms in figures[name].items()} for name in TIMES}
            results.fields["rows"].append(row)
            results.save()
            report.say(json.dumps(row))
    except Exception as error:
        results.problems.append(f"{kind}: {error}")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # The server drains, and returns.


def bench(url: str, bits: float | str, clients: int, args: argparse.Namespace) -> dict:
    """Returns what ``bench-serve`` prints."""
    requests = max(args.rounds * clients, 4)
    sizes = {"prompt-tokens": args.prompt_tokens, "max-tokens": args.max_tokens, "requests": requests}
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
    report.add_arguments(parser)
    args = parser.parse_args()
    config = random_model.shape(args.shape)
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    sizes = {"slots": args.slots, "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens}
    results = report.Report(args, shape=random_model.label(args.shape), **sizes, rows=[])
    for kind in args.weights:
        time_server(kind, config, args, results)
        gc.collect()  # the weights of the model that ended
    results.finish()


if __name__ == "__main__":
    main()
