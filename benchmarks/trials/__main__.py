"""Converts a model with each variant that was tried and not adopted, and measures its quality.

    python benchmarks/trials --model M --calib books_calib.txt --data books_test.txt docs_test.txt \\
        --work WORK --output FILE

Each trial runs the real converter and the real measurement with one change (``Trial``), in a separate
process. The modules beside this one define the trials. Models that exist in WORK are reused. FILE keeps a row
for each trial and setting. The script prints the table rows of
``benchmarks/notes/2026-11-27-quality-trials.md``.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import trial
from bases import BASES
from code_trials import CODE_TRIALS
from gains_trials import GAINS_TRIALS
from refits import REFITS
from roundings import ROUNDINGS
from splits import SPLITS

GROUPS = {
    "bases": BASES,
    "codes": CODE_TRIALS,
    "gains": GAINS_TRIALS,
    "refits": REFITS,
    "roundings": ROUNDINGS,
    "splits": SPLITS,
}
TRIALS = {name: one for group in GROUPS.values() for name, one in group.items()}

TABLE_BITS = (2.0, 3.0)
"""Settings whose perplexity, and whose KL divergence on further texts, are in the table."""

COLUMNS = ("bits", "realised_bits", "kl", "kl_stderr", "perplexity", "stderr")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="unquantized Hugging Face checkpoint")
    add("--calib", required=True, type=Path, metavar="FILE", help="calibration text")
    add("--calib-tokens", default="65536", metavar="N", help="calibration tokens (default: 65536)")
    add("--data", required=True, type=Path, nargs="+", metavar="FILE", help="texts to measure on")
    add("--work", required=True, type=Path, metavar="DIR", help="directory for the converted models")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSON file to update; results of other trials in it are kept",
    )
    add("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), help="trials to run (default: all)")
    add("--groups", nargs="+", choices=GROUPS, help="run all trials of these groups")
    add("--run-one", choices=TRIALS, help=argparse.SUPPRESS)
    add("--print", action="store_true", help="only print the table rows from --output")
    args = parser.parse_args()
    if args.run_one:
        return _measure(args)
    chosen = [name for group in args.groups for name in GROUPS[group]] if args.groups else args.trials
    if not args.print:
        for name in chosen:
            trial.run_apart(name, sys.argv[1:])
            print(_table(json.loads(args.output.read_text()), [name]), flush=True)
    report = json.loads(args.output.read_text())
    print(_table(report, [name for name in chosen if name in report]))
    return 0


def _measure(args: argparse.Namespace) -> int:
    one = TRIALS[args.run_one]
    rows = trial.run(one, args.model, args.calib, args.calib_tokens, args.data, args.work / args.run_one)
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    report[args.run_one] = {
        "what": one.what,
        "flags": list(one.flags),
        "model": Path(args.model).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "texts": {
            text: [{key: row[key] for key in COLUMNS} for row in of_text] for text, of_text in rows.items()
        },
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _table(report: dict, names: list[str]) -> str:
    """Returns the table rows of trials in Markdown.

    A row has the KL divergence on the first text at every setting, that on the other texts at ``TABLE_BITS``,
    and the perplexity on the first text at ``TABLE_BITS``.
    """
    lines = []
    for name in names:
        first, *others = report[name]["texts"].values()
        numbers = [f"{row['kl']:.3g}" for row in first]
        numbers += [f"{row['kl']:.3g}" for rows in others for row in rows if row["bits"] in TABLE_BITS]
        numbers += [f"{row['perplexity']:.2f}" for row in first if row["bits"] in TABLE_BITS]
        lines.append("| " + " | ".join([f"{TRIALS[name].what} (`{name}`)", *numbers]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
