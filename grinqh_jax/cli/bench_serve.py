"""The verb ``bench-serve``: load on a running server, and the times that its clients see."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grinqh_jax.benchmarking import load
from grinqh_jax.cli import command, flags
from grinqh_jax.cli.serve import API_KEY
from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import json_line

TIMES = {
    "time_to_first_event": "time to first event",
    "time_between_events": "time between events",
    "time_per_token": "time per token",
    "request": "whole request",
}
"""Figures in milliseconds and their names in the table."""


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax bench-serve",
        description="Send requests to a server with OpenAI's protocol and measure times and throughput. "
        f"{API_KEY} has the API key, if the server wants one.",
    )
    add = result.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server (default: http://127.0.0.1:8000)")
    add("--model", metavar="NAME", help="name of the model (default: the server's only one)")
    add("--bits", type=flags.bits, metavar="B", help="mean bits read per weight, or full")
    add("--requests", type=flags.positive, default=100, metavar="N", help="number of requests (default: 100)")
    loop = result.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=flags.positive,
        default=8,
        metavar="N",
        help="closed loop: number of clients, each of which sends one request after another (default: 8)",
    )
    loop.add_argument(
        "--rate",
        type=flags.number,
        metavar="R",
        help="open loop: mean number of requests per second, at random times (Poisson)",
    )
    source = result.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts, one a line: a JSON object with the field prompt, or plain text; repeated as needed",
    )
    source.add_argument(
        "--prompt-tokens",
        type=flags.positive,
        default=512,
        metavar="N",
        help="number of random tokens of each prompt (default: 512)",
    )
    add(
        "--max-tokens",
        type=flags.positive,
        default=128,
        metavar="N",
        help="tokens of an answer (default: 128)",
    )
    add("--seed", type=flags.whole, default=0, metavar="N", help="seed of prompts and times (default: 0)")
    add("--json", action="store_true", help="print one JSON object, not a table")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_bench, parser(), argv)


def _bench(args: argparse.Namespace) -> int:
    if args.rate is not None and not 0 < args.rate <= 1e4:
        raise UsageError(f"--rate {args.rate:g}: expected more than 0 and at most 10,000 requests per second")
    target = load.Target(
        url=args.url.rstrip("/").removesuffix("/v1"),
        key=os.environ.get(API_KEY),
        model=args.model,
        bits=args.bits,
        max_tokens=args.max_tokens,
    )
    if args.prompts:
        prompts: list[Any] = _prompts(args.prompts, args.requests)
    else:
        prompts = list(load.random_prompts(target, args.requests, args.prompt_tokens, args.seed))
    progress = _Progress(args.requests)
    if args.rate is None:
        measured, seconds = load.closed_loop(target, prompts, args.concurrency, progress.one)
    else:
        measured, seconds = load.open_loop(target, prompts, args.rate, args.seed, progress.one)
    progress.clear()
    figures = load.summary(measured, seconds)
    setting = {
        "url": args.url,
        "bits": args.bits,
        "concurrency": args.concurrency if args.rate is None else None,
        "rate": args.rate,
        "max_tokens": args.max_tokens,
    }
    if args.json:
        print(json_line(setting | figures))
    else:
        _print_table(figures)
    for error, count in figures["errors"].items():
        print(f"{count} requests failed: {error}", file=sys.stderr)
    return command.FAILURE if figures["failed"] == figures["requests"] else 0


def _print_table(figures: dict[str, Any]) -> None:
    bits = figures["realised_bits"]
    print(
        f"{figures['requests']} requests, {figures['failed']} failed, in {figures['seconds']:.1f} s: "
        f"{figures['requests_per_second']:.2f} requests/s, {figures['tokens_per_second']:.1f} tokens/s, "
        f"{figures['prompt_tokens_per_second']:.1f} prompt tokens/s"
        + (f", {bits:.3f} realised bits" if bits is not None else "")
    )
    names = ("mean", *(f"p{each}" for each in load.PERCENTILES))
    print(f"{'milliseconds':<22}" + "".join(f"{name:>10}" for name in names))
    for key, title in TIMES.items():
        values = [figures[key][name] for name in names]
        shown = ["-" if value is None else f"{value:.2f}" for value in values]
        print(f"{title:<22}" + "".join(f"{value:>10}" for value in shown))


def _prompts(path: str, count: int) -> list[str]:
    """Returns ``count`` prompts of a file, repeated as needed.

    Raises:
      UsageError: The file cannot be read or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    prompts = [_prompt(line) for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} has no prompt; write one a line")
    return [prompts[i % len(prompts)] for i in range(count)]


def _prompt(line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line
    prompt = value.get("prompt") if isinstance(value, dict) else None
    return prompt if isinstance(prompt, str) else line


class _Progress:
    """Number of finished requests on stderr, if that is a terminal."""

    def __init__(self, total: int):
        self._total, self._done, self._shown = total, 0, sys.stderr.isatty()

    def one(self) -> None:
        self._done += 1
        if self._shown:
            print(f"\r{self._done}/{self._total} requests", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
