"""Flags that several verbs share: the model, the settings of the dial, the options of a request."""

import argparse
import math
import re
from collections.abc import Sequence

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.cli import text_input
from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.request import RANGES, Request, out_of_range
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.errors import UsageError

MAX_BITS = 8
"""Most bits per weight that a checkpoint stores."""

DEFAULT_BITS: tuple[Bits, ...] = (2.0, 3.0, 4.0, FULL)
"""Settings that ``perplexity`` and ``evaluate`` measure by default."""


def bits(text: str) -> Bits:
    """Parses mean bits per weight, or ``full``. The range of a checkpoint's dial may be smaller."""
    if text == FULL:
        return FULL
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor full")
    if not 0 < value <= MAX_BITS:
        raise argparse.ArgumentTypeError(f"{text} bits per weight: expected 1 to {MAX_BITS}, or full")
    return value


def bits_list(text: str) -> list[Bits]:
    """Parses a comma-separated list of ``bits`` and drops duplicates."""
    return list(dict.fromkeys(bits(item.strip()) for item in text.split(",")))


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    return _integer(text, 1)


def non_negative(text: str) -> int:
    """Parses an integer of at least 0."""
    return _integer(text, 0)


def whole(text: str) -> int:
    """Parses an integer."""
    return _integer(text, None)


def number(text: str) -> float:
    """Parses a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def size(text: str) -> int:
    """Parses a number of bytes, such as ``8G`` or ``512M`` (powers of 1024)."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    match = re.fullmatch(r"(\d{1,12})([KMG]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512M or 8G")
    return int(match[1]) * units[match[2].upper()]


def _integer(text: str, least: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if least is not None and value < least:
        raise argparse.ArgumentTypeError(f"{text}: expected {least} or more")
    return value


def add_model(parser: argparse._ActionsContainer) -> None:
    """Adds ``--model``."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        default=str(BUNDLED_MODEL),
        help="GRINQH checkpoint, or an unquantized Hugging Face checkpoint with --bits full "
        "(default: the bundled qwen3-7m)",
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``generate`` and ``chat`` turn into a ``Request``."""
    add = parser.add_argument
    add(
        "-n",
        "-m",
        "--max-tokens",
        type=whole,
        default=256,
        metavar="N",
        help="largest number of tokens to generate (default: 256)",
    )
    add("--bits", type=bits, metavar="B", help="mean bits read per weight, or full (default: 4)")
    add(
        "--temp",
        "--temperature",
        dest="temperature",
        type=number,
        metavar="T",
        help="sampling temperature; 0 decodes greedily (default: from generation_config.json, else 0)",
    )
    add(
        "--top-p",
        type=number,
        metavar="P",
        help="sample from the smallest set of most probable tokens whose probabilities sum to P "
        "(default: from generation_config.json, else 1)",
    )
    add(
        "--top-k",
        type=whole,
        metavar="K",
        help="sample from the K most probable tokens; 0 means all "
        "(default: from generation_config.json, else 0)",
    )
    add(
        "--min-p",
        type=number,
        metavar="P",
        help="sample from tokens at least P times as probable as the most probable one "
        "(default: from generation_config.json, else 0)",
    )
    add(
        "--repetition-penalty",
        type=number,
        metavar="R",
        help="divide positive logits of tokens in prompt and text by R, and multiply negative ones "
        "(default: from generation_config.json, else 1)",
    )
    add(
        "--presence-penalty",
        type=number,
        metavar="P",
        help="subtract P from the logits of generated tokens (default: from generation_config.json, else 0)",
    )
    add(
        "--frequency-penalty",
        type=number,
        metavar="F",
        help="subtract F from the logit of a token for each time that it was generated "
        "(default: from generation_config.json, else 0)",
    )
    add("--seed", type=whole, default=0, metavar="N", help="random seed of sampling (default: 0)")
    add("--system-prompt", metavar="TEXT", help="system message at the start of the conversation")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the generated text before this string; may be repeated",
    )
    add(
        "--max-context",
        type=positive,
        metavar="N",
        help="largest number of tokens in prompt and generated text together (default: the model's limit)",
    )


def add_speculate(parser: argparse._ActionsContainer) -> None:
    """Adds ``--speculate``, a ``SpeculationSetting`` or None."""
    parser.add_argument(
        "--speculate",
        type=speculation,
        default=None,
        metavar="DRAFTER",
        help="guess tokens and verify several in one step: off, lookup (earlier parts of the text), "
        "self[@BITS] (the model at fewer bits), or MODEL[@BITS] (another model of the same vocabulary) "
        "(default: off)",
    )


def speculation(text: str) -> SpeculationSetting | None:
    """Parses a setting of speculation."""
    try:
        return SpeculationSetting.parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def request(args: argparse.Namespace) -> Request:
    """Builds the ``Request`` from the flags of ``add_request``.

    Raises:
      UsageError: values are out of range; the message names the flags.
    """
    fields = {name: getattr(args, name) for name in RANGES}
    if problems := out_of_range(fields, _flag):
        raise UsageError("; ".join(problems))
    stop = [text_input.argument(text, "--stop") for text in args.stop]
    return Request(bits=args.bits, seed=args.seed, stop=stop, **fields)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def system_message(args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns the system message of ``--system-prompt``, or an empty list without the flag.

    Raises:
      UsageError: the text is not UTF-8.
    """
    if args.system_prompt is None:
        return []
    return [{"role": "system", "content": text_input.argument(args.system_prompt, "--system-prompt")}]


def add_bits_list(parser: argparse.ArgumentParser) -> None:
    """Adds ``--bits`` as a list, and ``--json``."""
    parser.add_argument(
        "--bits",
        type=bits_list,
        metavar="B,B,...",
        help="settings of the dial, each in mean bits read per weight, or full "
        "(default: 2,3,4,full, or full for an unquantized model)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, not a table")


def dial_settings(requested: Sequence[Bits] | None, targets: Sequence[float] | None) -> list[Bits]:
    """Returns the settings to measure: those requested, or the defaults that a model supports.

    Args:
      requested: Settings, which the model supports (see ``ModelFiles.check``); None for the defaults.
      targets: Ascending mean bits of the model's threshold tables; None for an unquantized model.
    """
    if requested is not None:
        return list(requested)
    if targets is None:
        return [FULL]
    return [bits for bits in DEFAULT_BITS if bits == FULL or targets[0] <= bits <= targets[-1]]
