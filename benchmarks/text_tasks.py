"""Makes two tasks from texts, and measures how many a model solves at several bits.

    python benchmarks/text_tasks.py --data wiki.txt --reference DIR_OR_GGUF --models smollm2 --output FILE

*Cloze*: predict the last word of a passage, which occurs earlier in the passage, as in LAMBADA (arXiv
1606.06031). *Choice*: find the continuation of a passage among it and three passages from elsewhere in the
text, by log-likelihood per character. Scores come from ``grinqh_jax.evaluation.scoring``, as those of
``lm-eval`` do. Differences to the reference are paired: both models read the same passages. FILE is written
after each setting.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shlex
import sys
from typing import Any

import jax
import numpy as np

from checkpoints_tools.source.open import open_source
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.evaluation.scoring import score
from grinqh_jax.hf import load_decoder

CONTEXT_WORDS, CONTINUATION_WORDS, CHOICES = 60, 15, 4
LETTERS_OF_A_WORD = 4
"""Length of the shortest word that the cloze task asks for."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A passage and its continuations, of which the first is the right one."""

    context: str
    continuations: tuple[str, ...]


def passages(text: str, words: int) -> list[list[str]]:
    """Cuts a text into passages of ``words`` words."""
    all_words = text.split()
    return [all_words[i : i + words] for i in range(0, len(all_words) - words + 1, words)]


def cloze_cases(text: str) -> list[Case]:
    """Returns one case for each passage that has a fitting last word."""
    cases = []
    for passage in passages(text, 2 * CONTEXT_WORDS):
        names = [re.sub(r"\W", "", word) for word in passage]
        for end in range(CONTEXT_WORDS, len(passage)):
            word = passage[end]
            if word.isalpha() and len(word) >= LETTERS_OF_A_WORD and word in names[:end]:
                cases.append(Case(" ".join(passage[:end]), (" " + word,)))
                break
    return cases


def choice_cases(text: str, rng: np.random.Generator) -> list[Case]:
    """Returns one case for each passage, with wrong continuations from other passages."""
    parts = passages(text, CONTEXT_WORDS + CONTINUATION_WORDS)
    ends = [" " + " ".join(part[CONTEXT_WORDS:]) for part in parts]
    cases = []
    for i, part in enumerate(parts):
        wrong = rng.choice(np.delete(np.arange(len(parts)), i), CHOICES - 1, replace=False)
        context = " ".join(part[:CONTEXT_WORDS])
        cases.append(Case(context, (ends[i], *(ends[j] for j in wrong))))
    return cases


def solved(model: Generator, cases: list[Case], bits) -> tuple[np.ndarray, list[float]]:
    """Returns which cases the model solves, and the bits read for each, none at full precision."""
    encode = model.tokenizer.encode
    pairs = [
        (encode(case.context), encode(end, special_tokens=False))
        for case in cases
        for end in case.continuations
    ]
    scores = score(model, pairs, bits, max_length=512)
    choices = len(cases[0].continuations)
    if choices == 1:
        right = np.array([one.greedy for one in scores])
    else:
        characters = np.array([[len(end) for end in case.continuations] for case in cases])
        likelihoods = np.array([one.log_likelihood for one in scores]).reshape(-1, choices) / characters
        right = likelihoods.argmax(axis=1) == 0
    return right, [one.bits for one in scores if one.bits is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", type=pathlib.Path, required=True, metavar="FILE", help="texts")
    add("--reference", required=True, metavar="DIR_OR_GGUF", help="unquantized model")
    add("--models", nargs="+", required=True, type=pathlib.Path, metavar="DIR", help="converted models")
    add("--fixed", nargs="*", default=[], type=pathlib.Path, metavar="DIR", help="results of baselines")
    add("--bits", nargs="+", default=["2", "3", "4", "full"], metavar="B", help="default: 2 3 4 full")
    add("--cloze", type=int, default=400, metavar="N", help="cloze cases (default: 400)")
    add("--choice", type=int, default=400, metavar="N", help="choice cases of four texts (default: 400)")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()

    rng, wanted = np.random.default_rng(0), {"cloze": args.cloze, "choice": args.choice}
    tasks: dict[str, list[Case]] = {name: [] for name in wanted}
    for path in args.data:
        text = path.read_text()
        for name, cases in (("cloze", cloze_cases(text)), ("choice", choice_cases(text, rng))):
            share = -(-wanted[name] // len(args.data))
            tasks[name] += [cases[i] for i in sorted(rng.permutation(len(cases))[:share])]
    runs = [(str(path), path, "full") for path in args.fixed]
    runs += [(str(path), path, bits) for path in args.models for bits in args.bits]
    first = Generator.load(args.models[0])
    source = open_source(args.reference)
    original = load_decoder(source, first.model.compute_dtype)
    reference = Generator(original, first.tokenizer, first.defaults, None, first.directory)
    expected = {name: solved(reference, cases, "full")[0] for name, cases in tasks.items()}
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cases": {name: len(cases) for name, cases in tasks.items()},
        "rows": [],
    }

    def keep(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(row, flush=True)

    keep({"model": "original", "bits": 16} | _accuracies(expected, expected))
    loaded: dict[pathlib.Path, Generator] = {}
    for label, path, bits in runs:
        model = loaded.setdefault(path, Generator.load(path))
        results = {
            name: solved(model, cases, "full" if bits == "full" else float(bits))
            for name, cases in tasks.items()
        }
        right = {name: result[0] for name, result in results.items()}
        read = [bits for _, all_bits in results.values() for bits in all_bits]
        facts = {"model": label, "bits": bits, "bits_read": round(float(np.mean(read)), 3) if read else None}
        keep(facts | _accuracies(right, expected))
    return 0


def _accuracies(right: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns accuracies and paired differences to the reference, with their standard errors."""
    row = {}
    for name, solved_cases in right.items():
        root = np.sqrt(len(solved_cases))
        difference = solved_cases.astype(float) - expected[name]
        row[name] = round(float(solved_cases.mean()), 4)
        row[f"{name}_stderr"] = round(float(solved_cases.std(ddof=1) / root), 4)
        row[f"{name}_difference"] = round(float(difference.mean()), 4)
        row[f"{name}_difference_stderr"] = round(float(difference.std(ddof=1) / root), 4)
    return row


if __name__ == "__main__":
    sys.exit(main())
