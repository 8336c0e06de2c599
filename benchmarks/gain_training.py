"""Compares settings of the training of level gains: converts a model once, trains and measures several times.

    python benchmarks/gain_training.py --model DIR --data books.txt docs.txt --work DIR --output FILE

Everything before the training runs once, so a further setting costs its training and its measurement: on an
H200 3 s and 2 s for a model of 32 million parameters.
"""

import argparse
import json
import pathlib
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp

from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import compilation, driver, train_gains
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.evaluation.perplexity import measure, read_tokens
from grinqh_jax.hf import open_checkpoint

SETTINGS = {
    "three settings, 512 tokens": {"STEPS": 32, "WINDOW": 512, "RATE": 0.03, "BITS": (1.5, 2.0, 3.0)},
    "three settings, 256 tokens": {"STEPS": 16, "WINDOW": 256, "RATE": 0.015, "BITS": (1.5, 2.0, 3.0)},
    "two settings": {"STEPS": 24, "WINDOW": 256, "RATE": 0.015, "BITS": (1.75, 2.5)},
    "two settings, rate 0.02": {"STEPS": 24, "WINDOW": 256, "RATE": 0.02, "BITS": (1.75, 2.5)},
    "two settings, rate 0.03": {"STEPS": 24, "WINDOW": 256, "RATE": 0.03, "BITS": (1.75, 2.5)},
    "two settings, 32 steps": {"STEPS": 32, "WINDOW": 256, "RATE": 0.015, "BITS": (1.75, 2.5)},
    "2 and 3 bits, rate 0.02": {"STEPS": 24, "WINDOW": 256, "RATE": 0.02, "BITS": (2.0, 3.0)},
}
"""Constants of ``train_gains`` by name of the setting."""

MEASURED_BITS = (2.0, 3.0, 4.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="Hugging Face checkpoint")
    add("--calib", nargs="+", default=[], metavar="FILE", help="calibration texts (default: the bundled one)")
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens (default: 32768)")
    add("--data", nargs="+", type=pathlib.Path, required=True, metavar="FILE", help="texts to measure")
    add("--measure-tokens", type=int, default=8192, metavar="N", help="tokens of each text (default: 8192)")
    add("--sequence-length", type=int, default=1024, metavar="L", help="tokens per window (default: 1024)")
    add("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="default: all")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for the checkpoint")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()

    compilation.prepare()
    source = open_checkpoint(args.model)
    plan = make_plan(source, read_calibration(source, args.calib, args.tokens), Options())
    train, rows = train_gains.train_gains, {"fitted, not trained": {}}

    def train_all(model, windows, initial, on_progress):
        rows["fitted, not trained"]["gains"] = initial
        for name in args.settings:
            start = time.monotonic()
            with mock.patch.multiple(train_gains, **SETTINGS[name]):
                gains = train(model, windows, initial)
            rows[name] = {"gains": gains, "seconds": round(time.monotonic() - start, 1)}
            print(f"{name}: trained in {rows[name]['seconds']} s", flush=True)
        return gains

    with mock.patch.object(train_gains, "train_gains", train_all):
        driver.convert(plan, args.work / "out", overwrite=True)

    graded, original = Generator.load(args.work / "out"), Generator.load(args.model).model
    for name, row in rows.items():
        for linear, gains in row.pop("gains").items():
            graded.model.graded_linear(linear).level_gains.set_value(jnp.asarray(gains))
        for path in args.data:
            tokens = read_tokens(graded, path, args.measure_tokens)
            results = measure(
                graded.model,
                graded.targets,
                tokens,
                MEASURED_BITS,
                reference=original,
                sequence_length=args.sequence_length,
            )
            row[path.stem] = [round(result.kl, 5) for result in results]
        print(name, row, flush=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bits": MEASURED_BITS,
        "kl": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
