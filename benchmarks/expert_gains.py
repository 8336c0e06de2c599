"""Compares level gains that all experts of a layer share with those of each expert, by the divergence.

    python benchmarks/expert_gains.py --model MIXTURE --data books.txt docs.txt --work DIR --output FILE

Converts a mixture once. Trains the level gains on the calibration text: shared by the experts, as the
converter does; and of each expert, from the start or from the shared ones on. Each seed trains on other
windows of the calibration text. Measures the divergence from the original and the loss on windows of each
text: all variants read the same windows at the same thresholds, so their differences are those of pairs.
"""

import argparse
import json
import pathlib
import sys
import time
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import compilation, driver, graded_divergence, train_gains
from checkpoints_tools.convert.graded_divergence import divergence
from checkpoints_tools.convert.graded_model import WindowStates
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax.hf import open_checkpoint
from grinqh_jax.text.documents import read_documents
from grinqh_jax.text.tokenizer import Tokenizer

SHARED = "shared, trained (the product)"


def windows_of_seed(windows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns what ``train_gains.training_windows`` does, with windows in the order of a seed."""
    length = min(train_gains.WINDOW, windows.shape[1])
    rows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]


class Logits:
    """Collects the logits of the graded model in place of ``graded_divergence._range_outputs``."""

    def __init__(self):
        self.ranges, self.inner = [], graded_divergence._range_outputs

    def __call__(self, *arguments):
        exact, graded = self.inner(*arguments)
        self.ranges.append(graded)
        return exact, graded

    def losses(self, model, windows: np.ndarray) -> list[float]:
        """Returns the mean negative log-likelihood of the tokens of each window, from the first scored on."""
        logits = model.original.config.logit_transform(jnp.concatenate(self.ranges, -1))
        assert logits.shape[-1] == model.original.config.vocab_size, "each range was computed once"
        order = np.argsort(np.concatenate(list(model.vocabulary_blocks.values())))
        first = first_scored_position(windows.shape[1])
        log_p = jax.nn.log_softmax(logits[:, first:-1], -1)
        of_next = jnp.take_along_axis(log_p, jnp.asarray(order[windows[:, first + 1 :]])[..., None], -1)
        return (-of_next[..., 0].mean(-1)).tolist()


def read_windows(path: pathlib.Path, tokenizer: Tokenizer, length: int, count: int) -> np.ndarray:
    """Returns ``count`` windows of token ids, spread evenly over a text."""
    ids = [token for document in read_documents(path) for token in tokenizer.encode(document)]
    rows = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="Hugging Face checkpoint of a mixture",
    )
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens (default: 32768)")
    add("--data", nargs="+", type=pathlib.Path, required=True, metavar="FILE", help="texts to measure")
    add("--windows", type=int, default=16, metavar="N", help="windows of each text (default: 16)")
    add("--length", type=int, default=256, metavar="L", help="tokens of a window (default: 256)")
    add("--bits", nargs="+", type=float, default=[2, 3, 4], metavar="B", help="settings (default: 2 3 4)")
    add("--steps", type=int, nargs="+", default=[24], metavar="N", help="steps of the training (default: 24)")
    add("--seeds", type=int, default=3, metavar="N", help="orders of the calibration text (default: 3)")
    add("--twice", action="store_true", help="also train from the shared gains on")
    add("--no-refit", action="store_true", help="convert without refit")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for the checkpoint")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()

    compilation.prepare()
    start = time.monotonic()
    source = open_checkpoint(args.model)
    tokenizer = Tokenizer.load(source.directory)
    texts = {path.stem: read_windows(path, tokenizer, args.length, args.windows) for path in args.data}
    calibration = read_calibration(source, [], args.tokens)
    plan = make_plan(source, calibration, Options(refit=not args.no_refit))
    train = train_gains.train_gains
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "divergence": {},
        "loss": {},
    }

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f}s] {text}", flush=True)

    def compare(model, windows, initial, on_progress):
        say("converted")
        experts, count = {n for n in initial if ".experts_" in n}, source.config.num_experts
        states = {name: WindowStates.compute(model, text) for name, text in texts.items()}
        head = model.head()

        def of_each(gains):
            return {
                n: np.tile(np.asarray(g), (count, 1)) if n in experts and np.ndim(g) == 1 else np.asarray(g)
                for n, g in gains.items()
            }

        def measure(variant, gains):
            gains = {name: jnp.asarray(array) for name, array in gains.items()}
            rows, losses = (report[table].setdefault(variant, {}) for table in ("divergence", "loss"))
            for name, bits in ((name, bits) for name in states for bits in args.bits):
                values, nats = [], []
                for pair in np.arange(len(texts[name]) // 2 * 2).reshape(-1, 2):
                    with mock.patch.object(graded_divergence, "_range_outputs", Logits()) as logits:
                        values += divergence(model, head, states[name].at(pair), gains, [bits] * 2)[0]
                    nats += logits.losses(model, texts[name][pair])
                rows.setdefault(f"{name}, {bits:g}", []).append(values)
                losses.setdefault(f"{name}, {bits:g}", []).append(nats)
                say(f"{variant}: {name}, {bits:g} bits: {np.mean(values):.4f}, loss {np.mean(nats):.4f}")
            args.output.write_text(json.dumps(report, indent=1) + "\n")

        measure("fitted, not trained", initial)
        for steps, seed in ((steps, seed) for steps in args.steps for seed in range(args.seeds)):
            chosen = partial(windows_of_seed, seed=seed)
            with mock.patch.multiple(train_gains, STEPS=steps, training_windows=chosen):
                shared = train(model, windows, initial)
                measure(f"{SHARED}, {steps} steps", shared)
                each = train(model, windows, of_each(initial))
                measure(f"of each expert, {steps} steps", each)
                if args.twice:
                    measure(
                        f"of each expert from shared, {steps} steps", train(model, windows, of_each(shared))
                    )
                    measure(f"shared, twice, {steps} steps", train(model, windows, shared))
        spread = {n: np.std(np.log(each[n][:, :2]), axis=0).tolist() for n in experts}
        report["deviation_of_log_gains"] = np.mean(list(spread.values()), axis=0).tolist()
        return shared

    with mock.patch.object(train_gains, "train_gains", compare):
        driver.convert(plan, args.work / "out", overwrite=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for variant in report["divergence"]:
        shared = f"{SHARED}, {variant.rpartition(', ')[2]}"
        for case in report["divergence"][variant] if shared in report["divergence"] else []:
            for table, whole in (("divergence", True), ("loss", False)):
                values, base = (np.asarray(report[table][name][case]) for name in (variant, shared))
                change = 100 * (values - base) / (base.mean() if whole else 1)
                by_seed = change.mean(1)
                error = change.mean(0).std(ddof=1) / change.shape[1] ** 0.5
                say(
                    f"{variant}: {case}: {table} {values.mean():.4f}, {change.mean():+.2f} +- {error:.2f} %"
                    f" over windows; by seed {', '.join(f'{seed:+.2f}' for seed in by_seed)}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
