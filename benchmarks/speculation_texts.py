"""Checks that greedy texts with drafts are those without, token for token.

    python benchmarks/speculation_texts.py --output FILE                                 the bundled model
    python benchmarks/speculation_texts.py --models qwen3-32m-grinqh --prompts 50 --bits 3 8

For each model and setting, plain decoding with a dial that holds its setting continues pieces of the bundled
text until there are enough greedy texts that do not end in a loop. Each drafter then decodes the same
prompts, always with as many drafts as fit, and every token is compared. Each prompt ends with its own
beginning, so that ``lookup`` has drafts. The script ends with an error if a text differs. The JSON file is
written after each row.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import time
from collections.abc import Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import report as reports
from report import say

from checkpoints_tools.calibration.text import BUNDLED_TEXT
from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.batching.rows import Rows
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.load_speculation import speculation_of
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.texts import Received, Texts

PROMPT_TOKENS, REPEATED_TOKENS, ANSWER_TOKENS, CAPACITY = 48, 8, 40, 128
TEXT_CHARACTERS = 200_000
MOST_CANDIDATES = 5
"""Largest number of texts that are decoded for each one that is compared."""

LONGEST_PERIOD, LOOPING_TOKENS = 8, 24
"""A text loops if its last ``LOOPING_TOKENS`` tokens repeat a piece of up to ``LONGEST_PERIOD`` tokens."""


def prompts_of(generator: Generator, count: int) -> list[list[int]]:
    """Returns pieces from all parts of the bundled text, neighbours far apart, that end as they begin."""
    text = BUNDLED_TEXT.read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    tokens = generator.tokenizer.encode(text)
    starts = np.linspace(0, len(tokens) - PROMPT_TOKENS, count).astype(int)
    starts = np.random.default_rng(0).permutation(starts)
    pieces = [tokens[start : start + PROMPT_TOKENS - REPEATED_TOKENS] for start in starts]
    return [piece + piece[:REPEATED_TOKENS] for piece in pieces]


def loops(tokens: Sequence[int]) -> bool:
    """Returns whether a text ends in a loop."""
    end = tokens[-LOOPING_TOKENS:]
    return any(end[period:] == end[:-period] for period in range(1, LONGEST_PERIOD + 1))


class Decoding:
    """Greedy decoding of one model, with or without drafts."""

    def __init__(self, generator: Generator, speculation: Speculation | None, slots: int):
        self._generator, self._speculation, self._slots = generator, speculation, slots

    def texts(self, prompts: Sequence[list[int]], bits: float) -> list[Received]:
        """Returns the texts after the prompts."""
        received = [Received() for _ in prompts]
        jobs = [self._job(prompt, bits, text) for prompt, text in zip(prompts, received, strict=True)]
        loop = self._loop(jobs[0], bits)
        with contextlib.closing(loop):
            for job in jobs:
                loop.add(job)
            while not loop.idle:
                loop.advance()
        for text in received:
            text.raise_error()
        return received

    def compile(self, programs: Programs, prompt: list[int], bits: float) -> None:
        """Compiles all programs, several at once."""
        job = self._job(prompt, bits, Received())
        widths = {bucket.tokens.shape[1] for bucket in Rows().cut(job, 0)}
        with contextlib.closing(self._loop(job, bits)) as loop:
            programs.compile(lowerings(loop.device, sorted(widths), job.settings, [(True, False)]))

    def _job(self, prompt: list[int], bits: float, received: Received) -> Job:
        wanted = self._generator.bits(bits)
        return Job(prompt, Settings.of_request(Sampling.on_host(1), wanted, (), ANSWER_TOKENS), received)

    def _loop(self, job: Job, bits: float) -> Texts:
        generator = self._generator
        return Texts(
            generator.model,
            generator.dial(bits),
            job.settings,
            capacity=CAPACITY,
            slots=self._slots,
            speculation=self._speculation,
        )


def check(name: str, args: argparse.Namespace, report: reports.Report) -> None:
    """Checks one model; adds a row for each setting and drafter."""
    generator = Generator.load(name)
    generator.holds_dial = True
    plain, drafting = Decoding(generator, None, args.slots), {}
    for text in args.drafters:
        speculation = speculation_of(SpeculationSetting.parse(text), generator)
        assert speculation is not None, f"{text} has drafts"
        always = Speculation(speculation.drafter, always=True)
        drafting[text] = Decoding(generator, always, args.slots)
    candidates, programs = prompts_of(generator, MOST_CANDIDATES * args.prompts), Programs()
    for decoding in (plain, *drafting.values()):
        decoding.compile(programs, candidates[0], args.bits[0])
    say(f"{name}: compiled")
    for bits in args.bits:
        if report.out_of_time(f"{name}, {bits} bits"):
            continue
        kept, expected, looping = [], [], 0
        for batch in itertools.batched(candidates, max(args.prompts // 4, 1)):
            for prompt, text in zip(batch, plain.texts(batch, bits), strict=True):
                looping += loops(text.tokens)
                if not loops(text.tokens) and len(kept) < args.prompts:
                    kept.append(prompt)
                    expected.append(text.tokens)
            if len(kept) == args.prompts or report.out_of_time(f"{name}, {bits} bits: more prompts"):
                break
        for drafter, decoding in drafting.items():
            case = f"{name}, {bits} bits, {drafter}"
            if not kept or report.out_of_time(case):
                continue
            start = time.perf_counter()
            texts = decoding.texts(kept, bits)
            seconds = time.perf_counter() - start
            different = [i for i, text in enumerate(texts) if text.tokens != expected[i]]
            figures = [text.speculation for text in texts if text.speculation is not None]
            steps, drafted, accepted = (
                sum(getattr(each, field) for each in figures) for field in ("steps", "drafted", "accepted")
            )
            row = {
                "model": pathlib.Path(name).resolve().name,
                "bits": bits,
                "drafter": drafter,
                "prompts": len(kept),
                "loops_left_out": looping,
                "different": different,
                "tokens": sum(len(text.tokens) for text in texts),
                "drafted": drafted,
                "accepted": accepted,
                "tokens_per_step": round((steps + accepted) / steps, 3),
                "seconds": round(seconds, 1),
            }
            report.fields["texts"].append(row)
            say(str(row))
            if different:
                report.problems.append(
                    f"{case}: {len(different)} of {len(kept)} texts differ: {different[:9]}"
                )
            if not accepted:
                report.problems.append(f"{case}: no draft was accepted")
            report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=[str(BUNDLED_MODEL)], metavar="DIR", help="(default: bundled)")
    add("--bits", nargs="+", type=float, default=[3, 8, 2, 4], metavar="B", help="(default: 3 8 2 4)")
    add("--drafters", nargs="+", default=["lookup", "self@2"], metavar="DRAFTER")
    add("--prompts", type=int, default=200, metavar="N", help="texts of each setting (default: 200)")
    add("--slots", type=int, default=2, metavar="N", help="texts decoded at once (default: 2)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, texts=[])
    for name in args.models:
        if not report.out_of_time(name):
            check(name, args, report)
    report.finish()


if __name__ == "__main__":
    main()
