"""Flags that several verbs share: the model, the dial, and what a request asks for."""

import argparse
import math

from grinqh_jax.bundled import BUNDLED_MODEL


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        default=str(BUNDLED_MODEL),
        help="GRINQH checkpoint, or an unquantized one for --bits full (default: the bundled qwen3-7m)",
    )


def bits(text: str) -> float | str:
    """An argparse type: mean bits per weight, or ``full``; whether they fit is the checkpoint's say."""
    if text == "full":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor full")
    return value


def add_request(result: argparse.ArgumentParser) -> None:
    """Adds the flags of a request, which ``generate`` and ``chat`` share."""
    add = result.add_argument
    add(
        "-m", "--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default 256)"
    )
    add("--bits", type=bits, metavar="B", help="mean bits read per weight, or full (default 4)")
    model = "default: the model's generation_config.json"
    add("--temp", type=float, metavar="T", help=f"temperature, 0 is greedy ({model}, else 0)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help=f"keep the likeliest tokens up to this mass ({model}, else 1)",
    )
    add("--top-k", type=int, metavar="K", help=f"keep the K likeliest tokens, 0 keeps all ({model}, else 0)")
    add(
        "--min-p",
        type=float,
        metavar="P",
        help=f"keep tokens P times as likely as the first ({model}, else 0)",
    )
    add("--seed", type=int, default=0, help="of sampling: the same seed gives the same text (default 0)")
    add("--system-prompt", metavar="TEXT", help="instructions that go before the conversation")
    add("--ignore-chat-template", action="store_true", help="give the prompt to the model as it is")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the text before this; repeatable")
    add("--max-context", type=int, metavar="N", help="most tokens of prompt and text (default: the model's)")


def request(args: argparse.Namespace):
    """The library's request that the flags ask for.

    Raises:
      UsageError: a value is out of its range.
    """
    from grinqh_jax.decoding.generator import Request

    return Request(
        bits=args.bits,
        max_tokens=args.max_tokens,
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
    )
