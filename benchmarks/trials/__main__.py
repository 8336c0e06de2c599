"""What was tried and is not in the product, with figures: models converted with each, and what they lose.

    python benchmarks/trials --model M --calib books_calib.txt --data books_test.txt docs_test.txt \\
        --work WORK --output FILE

The real converter and the real measurement, with one thing changed in them (``Trial``); the trials are listed
in the modules beside this one, each next to what it changes. Each runs in a process of its own. What is
there already in WORK is not made again; FILE keeps a row for each trial and setting, for the tables of
``docs/quality.md``, which are printed too.
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
from roundings import ROUNDINGS
from splits import SPLITS

GROUPS = {
    "bases": BASES,
    "codes": CODE_TRIALS,
    "gains": GAINS_TRIALS,
    "roundings": ROUNDINGS,
    "splits": SPLITS,
}
TRIALS = {name: one for group in GROUPS.values() for name, one in group.items()}

OTHERS = (2.0, 3.0)
"""Settings whose figures on other texts, and perplexities, are in the table."""

COLUMNS = ("bits", "realised_bits", "kl", "kl_stderr", "perplexity", "stderr")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True, type=Path)
    parser.add_argument("--calib-tokens", default="65536")
    parser.add_argument("--data", required=True, type=Path, nargs="+")
    parser.add_argument("--work", required=True, type=Path, help="directory for the models")
    parser.add_argument("--output", required=True, type=Path, help="JSON file; other trials in it are kept")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="all trials of these")
    parser.add_argument("--here", choices=TRIALS, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="only print the table of what is in the file")
    args = parser.parse_args()
    if args.here:
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
    one = TRIALS[args.here]
    rows = trial.run(one, args.model, args.calib, args.calib_tokens, args.data, args.work / args.here)
    report = json.loads(args.output.read_text()) if args.output.exists() else {}
    report[args.here] = {
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
    """Markdown: the divergence at every setting on the first text, at those of ``OTHERS`` on the others, and
    there the perplexity on the first."""
    lines = []
    for name in names:
        first, *others = report[name]["texts"].values()
        numbers = [f"{row['kl']:.3g}" for row in first]
        numbers += [f"{row['kl']:.3g}" for rows in others for row in rows if row["bits"] in OTHERS]
        numbers += [f"{row['perplexity']:.2f}" for row in first if row["bits"] in OTHERS]
        lines.append("| " + " | ".join([f"{TRIALS[name].what} (`{name}`)", *numbers]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
