"""Flags of ``python -m checkpoints_tools.pareto``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.calibration.allocation import target_grid
from checkpoints_tools.calibration.text import DEFAULT_TOKENS
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert.options import Options
from checkpoints_tools.pareto import figure
from checkpoints_tools.pareto.series import GRINQH, METHODS, WHOLE_HEAD
from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags
from grinqh_jax.decoding.bits import FULL
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.tasks import read_problems
from grinqh_jax.text.documents import read_documents

W_BITS = (2, 3, 4)
"""Default bits of the fixed-precision methods."""

BITS = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Default settings of the dial."""


class _Parser(cli.Parser):
    """A parser that accepts flags of the converter.

    It stores the flags that it does not know in ``args.convert``, and the whole command in ``args.command``.
    """

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else list(args)
        namespace, namespace.convert = self.parse_known_args(given, namespace)
        namespace.command = shlex.join(["python", "-m", "checkpoints_tools.pareto", *given])
        return namespace


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    result = _Parser(
        prog="python -m checkpoints_tools.pareto",
        allow_abbrev=False,
        description="Quality against bits read: quantizes a checkpoint with every method, measures each "
        "setting on texts and word problems against the unquantized model, and writes a table, JSON and a "
        "figure. Checkpoints and measurements in --work are reused. Flags not listed here (--quantizer, "
        "--basis, ...) are options of checkpoints_tools.convert.",
    )
    add = result.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="Hugging Face checkpoint (safetensors)")
    add("--work", type=Path, metavar="DIR", help="directory for converted checkpoints and results")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="texts to measure perplexity on")
    add(
        "--tasks",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="word problems, as for evaluate",
    )
    add(
        "--methods",
        type=_methods,
        default=list(METHODS),
        metavar="M,M,...",
        help=f"some of {', '.join(METHODS)} (default all; full precision is always measured)",
    )
    add(
        "--w-bits",
        type=_w_bits,
        default=list(W_BITS),
        metavar="B,B",
        help="bits of the fixed-precision methods (default 2,3,4)",
    )
    add(
        "--bits",
        type=flags.bits_list,
        default=list(BITS),
        metavar="B,B,...",
        help="settings of the dial (default 1.5,2,2.5,3,4); skip-int4 uses those up to 4",
    )
    add(
        "--sweep",
        type=_sweep,
        default=[],
        metavar="LOW:HIGH:STEP",
        help="also measure the first GRINQH curve at these steps of the dial, such as 1.5:8:0.25; exit with "
        "1 if perplexity ever rises by more than its standard error",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="'LABEL: FLAGS'",
        help="another GRINQH curve with options of convert, such as 'plain: --basis original --no-refit'",
    )
    add("--calib", type=Path, metavar="FILE", help="calibration text of all methods (default: as convert)")
    add(
        "--calib-tokens",
        type=flags.positive,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"maximum number of calibration tokens (default {DEFAULT_TOKENS})",
    )
    add("--tokens", type=flags.positive, metavar="N", help="measure the first N tokens of each text")
    add(
        "--sequence-length",
        type=flags.positive,
        default=512,
        metavar="L",
        help="tokens of a window (default 512)",
    )
    add("--limit", type=flags.positive, metavar="N", help="measure the first N problems")
    add(
        "--max-tokens",
        type=flags.positive,
        default=256,
        metavar="N",
        help="maximum number of tokens of an answer (default 256)",
    )
    add(
        "--batch",
        type=flags.positive,
        default=128,
        metavar="N",
        help="maximum number of problems answered together (default 128)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype that models are measured in (default: float32 on a CPU, bfloat16 elsewhere); float32 is "
        "exact on a GPU too",
    )
    add("--timing", type=Path, metavar="FILE", help="kernel times, from benchmarks/matvec.py --output")
    add("--json", type=Path, metavar="FILE", help="file of the results (default WORK/pareto.json)")
    add("--figure", type=Path, metavar="FILE", help=".png, .svg or .pdf (default WORK/pareto.png)")
    add("--no-figure", action="store_true", help="do not draw a figure")
    add("--title", metavar="TEXT", help="title of the figure")
    add(
        "--draw", type=Path, metavar="FILE.json", help="only draw --figure from the results of an earlier run"
    )
    return result


def check(args: argparse.Namespace) -> None:
    """Checks the flags, files and settings before hours of work.

    Raises:
      UsageError: Something is wrong; the message names every problem.
    """
    missing = [name for name in ("model", "work") if getattr(args, name) is None]
    problems = [f"--{name} is required" for name in missing]
    if not args.data and not args.tasks:
        problems.append("give a text (--data) or word problems (--tasks)")
    for read, paths in ((read_documents, args.data), (read_problems, args.tasks)):
        problems += [problem for path in paths if (problem := _problem(read, path))]
    outputs = [path for path in (args.json, args.figure) if path is not None]
    problems += [f"{path}: no such directory" for path in outputs if not path.parent.is_dir()]
    if FULL in args.bits:
        problems.append("--bits full: full precision is always measured; leave it out")
    if (args.sweep or args.variant) and GRINQH not in args.methods:
        problems.append("--sweep and --variant need grinqh among --methods")
    if not args.no_figure and (problem := _problem(figure.check, args.figure)):
        problems.append(problem)
    problems += _beyond_the_dial(args)
    if problems:
        raise UsageError("; ".join(problems))


def _problem(check: Callable[[Any], Any], value: Any) -> str | None:
    """Returns the message of the UsageError that ``check(value)`` raises, or None."""
    try:
        check(value)
    except UsageError as error:
        return str(error)
    return None


def _beyond_the_dial(args: argparse.Namespace) -> list[str]:
    """Returns a message for each curve with settings outside the range of its dial."""
    problems = []
    curves = [(args.convert, [*args.bits, *args.sweep])]
    for given, settings in curves + [(given, args.bits) for _, given in _variant_flags(args)]:
        least, *_, most = target_grid(options(given).max_bits)
        numbers = [bits for bits in settings if bits != FULL]
        beyond = [f"{bits:g}" for bits in numbers if not least <= bits <= most]
        if beyond and not {GRINQH, WHOLE_HEAD}.isdisjoint(args.methods):
            converted = f" with {shlex.join(given)}" if given else ""
            problems.append(f"bits {', '.join(beyond)}: the dial goes from {least:g} to {most:g}{converted}")
    return problems


def options(given: Sequence[str]) -> Options:
    """Parses options of a conversion. Wrong flags exit with the converter's message."""
    parser = cli.Parser(prog=convert.parser().prog)
    convert.add_options(parser)
    return convert.options_of(parser.parse_args(given))


def variants(args: argparse.Namespace) -> list[tuple[str, Options]]:
    """Returns the label of each ``--variant``, and its options of a conversion."""
    return [(label, options(given)) for label, given in _variant_flags(args)]


def _variant_flags(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Returns the label of each ``--variant``, and its flags."""
    result = []
    for text in args.variant:
        label, colon, given = text.partition(":")
        if not colon or not label.strip():
            raise UsageError(f"--variant {text!r}: expected 'LABEL: FLAGS'")
        result.append((label.strip(), shlex.split(given)))
    return result


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(METHODS)}")
    return methods


def _w_bits(text: str) -> list[int]:
    try:
        bits = [int(item) for item in text.split(",")]
    except ValueError:
        bits = [0]
    if not set(bits) <= {2, 3, 4, 8}:
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of 2,3,4,8")
    return bits


def _sweep(text: str) -> list[float]:
    try:
        low, high, step = map(float, text.split(":"))
        if not 0 < step <= high - low or low <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected LOW:HIGH:STEP, such as 1.5:8:0.25") from None
    return np.round(np.arange(low, high + step / 2, step), 6).tolist()
