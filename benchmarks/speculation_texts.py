"""Checks that greedy texts with drafts are those without, token for token.

    python benchmarks/speculation_texts.py --output FILE                                 the bundled model
    python benchmarks/speculation_texts.py --models qwen3-32m-grinqh --prompts 50 --bits 3 8
    python benchmarks/speculation_texts.py --mesh tp=2                                   on two devices

For each model and setting, plain decoding with a dial that holds its setting continues pieces of the bundled
text until there are enough greedy texts that do not end in a loop. Each drafter then decodes the same
prompts, always with as many drafts as fit, and every token is compared. Each prompt ends with its own
beginning, so that ``lookup`` has drafts. The script ends with an error if a text differs. The JSON file is
written after each batch of texts. The settings take turns, so a run with ``--seconds`` compares all of them.
"""

import argparse
import contextlib
import dataclasses
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
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.texts import Received, Texts
from grinqh_jax.sharding.mesh import make_mesh

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


@dataclasses.dataclass
class Progress:
    """What was compared at one setting of the bits.

    Attributes:
      prompts: Prompts that are left.
      compared: Number of texts that were compared.
      looping: Number of texts that ended in a loop and were left out.
      rows: Rows of the report, by drafter.
    """

    prompts: list[list[int]]
    compared: int = 0
    looping: int = 0
    rows: dict[str, dict] = dataclasses.field(default_factory=dict)


def check(name: str, args: argparse.Namespace, report: reports.Report) -> None:
    """Checks one model; adds a row for each setting and drafter, and completes it with every batch of texts.

    The settings take turns, so that at the time limit all have been compared on as many texts.
    """
    mesh = make_mesh(args.mesh, ModelFiles.open(name).config)
    generator = Generator.load(name, mesh=mesh)
    generator.holds_dial = True
    if (cut := generator.model.partition) is not None:
        report.fields["exchange"] = cut.exchange
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
    progress = {bits: Progress(list(candidates)) for bits in args.bits}
    while left := {b: p for b, p in progress.items() if p.prompts and p.compared < args.prompts}:
        for bits, of_bits in left.items():
            if report.out_of_time(f"{name}, {bits} bits: texts after the first {of_bits.compared}"):
                return
            batch = of_bits.prompts[: args.batch]
            del of_bits.prompts[: args.batch]
            texts = [text.tokens for text in plain.texts(batch, bits)]
            of_bits.looping += sum(loops(text) for text in texts)
            pairs = [pair for pair in zip(batch, texts, strict=True) if not loops(pair[1])]
            pairs = pairs[: args.prompts - of_bits.compared]
            for drafter, decoding in drafting.items():
                if pairs:
                    _compare(
                        pathlib.Path(name).resolve().name, bits, drafter, decoding, pairs, of_bits, report
                    )
            of_bits.compared += len(pairs)
    for bits, of_bits in progress.items():
        for drafter, row in of_bits.rows.items():
            if not row["accepted"]:
                report.problems.append(f"{name}, {bits} bits, {drafter}: no draft was accepted")


def _compare(
    model: str,
    bits: float,
    drafter: str,
    decoding: Decoding,
    pairs: list[tuple[list[int], list[int]]],
    progress: Progress,
    report: reports.Report,
) -> None:
    """Decodes prompts with drafts, compares their texts to the expected ones, and adds them to the row."""
    start = time.perf_counter()
    texts = decoding.texts([prompt for prompt, _ in pairs], bits)
    seconds = time.perf_counter() - start
    if drafter not in progress.rows:
        row = {"model": model, "bits": bits, "drafter": drafter, "prompts": 0, "loops_left_out": 0}
        row |= {"different": [], "tokens": 0, "steps": 0, "drafted": 0, "accepted": 0, "seconds": 0.0}
        progress.rows[drafter] = row
        report.fields["texts"].append(row)
    row = progress.rows[drafter]
    different = [
        row["prompts"] + i
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True))
        if text.tokens != pair[1]
    ]
    if different:
        report.problems.append(f"{model}, {bits} bits, {drafter}: texts differ: {different[:9]}")
    row["different"] += different
    row["prompts"] += len(pairs)
    row["loops_left_out"] = progress.looping
    row["tokens"] += sum(len(text.tokens) for text in texts)
    for figures in (text.speculation for text in texts):
        if figures is not None:
            for field in ("steps", "drafted", "accepted"):
                row[field] += getattr(figures, field)
    row["tokens_per_step"] = round((row["steps"] + row["accepted"]) / row["steps"], 3)
    row["seconds"] = round(row["seconds"] + seconds, 1)
    report.save()
    say(str(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=[str(BUNDLED_MODEL)], metavar="DIR", help="(default: bundled)")
    add("--bits", nargs="+", type=float, default=[3, 8, 2, 4], metavar="B", help="(default: 3 8 2 4)")
    add("--drafters", nargs="+", default=["lookup", "self@2"], metavar="DRAFTER")
    add("--prompts", type=int, default=200, metavar="N", help="texts of each setting (default: 200)")
    add("--mesh", metavar="tp=N|auto", help="decode on several devices")
    add("--batch", type=int, default=50, metavar="N", help="texts between two writes (default: 50)")
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
