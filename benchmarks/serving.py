"""Times the HTTP server under load, with random weights in the shape of a published model.

    python benchmarks/serving.py --output serving.json          Qwen3-8B, 1 to 32 clients, 3 and 4 bits, bf16

For each kind of weights one server runs in this process, as ``grinqh-jax serve`` does, and ``grinqh-jax
bench-serve`` sends requests from another process: a closed loop of clients, prompts of random tokens that
share no prefix, greedy answers. The tokenizer has a word for each token, so each token is text. The first
load of a server is not measured.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import tokenizers

from grinqh_jax.benchmarking import load, random_model
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.server import run as server
from grinqh_jax.server.limits import Limits
from grinqh_jax.server.service import Service
from grinqh_jax.serving.engine import Engine
from grinqh_jax.text.tokenizer import Tokenizer

SHOWN = ("requests_per_second", "tokens_per_second", "realised_bits")
TIMES = ("time_to_first_event", "time_between_events", "request")


def word_tokenizer(size: int, directory: pathlib.Path) -> Tokenizer:
    """Returns a tokenizer of ``size`` words. It knows those of the prompts of ``bench-serve``."""
    words = list(dict.fromkeys(load.TEXT.split()))
    words = (words + [f"word{i}" for i in range(len(words), size)])[:size]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, directory)


def time_server(kind: str, config, args: argparse.Namespace, record) -> None:
    """Serves a model with graded or bfloat16 weights, and measures it under each load."""
    make = random_model.graded if kind == "graded" else random_model.dense
    targets = random_model.TARGETS if kind == "graded" else None
    settings = args.bits if kind == "graded" else ["full"]
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        started = time.monotonic()
        model = jax.block_until_ready(make(config))
        tokenizer = word_tokenizer(config.vocab_size, directory)
        generator = Generator(model, tokenizer, GenerationConfig(), targets, directory)
        made = time.monotonic()
        with (
            server.bind("127.0.0.1", 0) as bound,
            Engine(
                generator, slots=args.slots, max_context=args.prompt_tokens + args.max_tokens + 64
            ) as engine,
        ):
            times = {"made_seconds": made - started, "compile_seconds": time.monotonic() - made}
            record(weights=kind, slots=args.slots, **{key: round(value, 1) for key, value in times.items()})
            clients = threading.Thread(
                target=measure, args=(kind, server.url(bound), settings, args, record), daemon=True
            )
            service = Service(args.shape, generator, engine, Limits())
            server.serve(service, bound, on_listening=clients.start)
            clients.join()


def measure(kind: str, url: str, settings: list, args: argparse.Namespace, record) -> None:
    """Runs ``bench-serve`` for each setting and number of clients, then ends the server."""
    try:
        bench(url, settings[0], 2, args)  # the first calls load kernels
        for clients in args.clients:
            for bits in settings:
                if time.monotonic() > args.end:
                    record(weights=kind, skipped=f"{clients} clients, {bits} bits: no time is left")
                    continue
                figures = bench(url, bits, clients, args)
                times = {name: {key: round(ms, 2) for key, ms in figures[name].items()} for name in TIMES}
                row = {name: figures[name] and round(figures[name], 3) for name in SHOWN}
                record(
                    weights=kind,
                    slots=args.slots,
                    bits=bits,
                    clients=clients,
                    failed=figures["failed"],
                    **row,
                    **times,
                )
    except Exception as error:
        record(weights=kind, error=str(error))
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # which the server drains on


def bench(url: str, bits: float | str, clients: int, args: argparse.Namespace) -> dict:
    """Returns what ``bench-serve`` prints."""
    command = [sys.executable, "-m", "grinqh_jax", "bench-serve", "--json", "--url", url]
    command += ["--bits", str(bits), "--concurrency", str(clients)]
    command += ["--requests", str(max(args.rounds * clients, 4))]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--max-tokens", str(args.max_tokens)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--shape", default="Qwen3-8B", metavar="NAME_OR_DIR", help="published shape, or directory of a model")
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--weights", nargs="+", default=["graded", "bf16"], choices=("graded", "bf16"))
    add("--bits", nargs="+", type=float, default=[3.0, 4.0], metavar="B", help="default: 3 4")
    add("--clients", nargs="+", type=int, default=[8, 1, 16, 4, 32], metavar="N", help="default: 8 1 16 4 32")
    add("--slots", type=int, default=16, metavar="N", help="answers decoded together (default: 16)")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    add("--max-tokens", type=int, default=256, metavar="N", help="default: 256")
    add("--rounds", type=int, default=3, metavar="N", help="requests of each client (default: 3)")
    add(
        "--seconds", type=float, default=500, metavar="S", help="start no load after this time (default: 500)"
    )
    add("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    args.end = time.monotonic() + args.seconds
    config = random_model.shape(args.shape)
    if args.layers:
        config = dataclasses.replace(config, layers=config.layers[: args.layers])
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "shape": random_model.label(args.shape),
        "prompt_tokens": args.prompt_tokens,
        "max_tokens": args.max_tokens,
        "rows": [],
    }
    print({name: value for name, value in report.items() if name != "rows"}, flush=True)

    def record(**row) -> None:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")

    for kind in args.weights:
        time_server(kind, config, args, record)
        gc.collect()  # the weights of the model that ended


if __name__ == "__main__":
    main()
