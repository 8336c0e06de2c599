"""Decode steps that verify drafts, with random weights, and their times, for ``speculation.py``."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import report as reports
import step_profile
from report import say
from speculation_replay import DRAFTS

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation.chunk import SlotTexts, speculative_chunk
from grinqh_jax.decoding.speculation.drafter import Drafter, DrafterState
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.model_drafter import SelfDrafter
from grinqh_jax.decoding.speculation.setting import DEFAULT_SELF_BITS
from grinqh_jax.decoding.speculation.speculation import DECODED_DRAFTS, MOST_DRAFTS
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.flat_model import FlatModel, decoder_of

OFF, LOOKUP, SELF = "off", "lookup", "self"
"""Drafters in the results. ``off`` is decoding without speculation."""

ENDLESS = -1e6
"""Number of tokens in the block of the dial at the start. The dial follows, and no block ends."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlwaysDrafts(PromptLookup):
    """Prompt lookup that always has drafts, so that all rows of a step read weights."""

    def propose(self, state, target, texts, count):
        draft, state, cache = super().propose(state, target, texts, count)
        # A constant would let XLA drop the search for drafts.
        return dataclasses.replace(draft, counts=jnp.maximum(draft.counts, count)), state, cache


@jax.jit(static_argnames=("drafts", "steps", "policy"), donate_argnames="cache")
def run(flat, cache, dial, last, texts, limits, drafter, most_drafts, *, drafts, steps, policy):
    """Runs a chunk with drafts of one greedy answer in each row; returns it and the cache."""
    batch = len(last)
    chunk, cache, *_ = speculative_chunk(
        decoder_of(flat),
        last,
        jnp.zeros(batch, bool),
        cache,
        dial,
        Sampling.create(batch),
        jnp.full(1, -1, jnp.int32),
        limits,
        texts,
        drafter,
        DrafterState(),
        most_drafts,
        steps=steps,
        drafts=drafts,
        policy=policy,
    )
    return chunk, cache


@dataclasses.dataclass(frozen=True)
class Case:
    """What one program decodes."""

    context: int
    texts: int
    drafter: str = LOOKUP
    drafts: int = 0

    def __str__(self) -> str:
        return f"context {self.context}, {self.texts} texts, {self.drafter}, {self.drafts} drafts"


class Steps:
    """The steps of one shape: its programs, and their times."""

    def __init__(self, config: ModelConfig, label: str, args: argparse.Namespace, report: reports.Report):
        self.model = random_model.graded(config)
        self._label, self._args, self._report = label, args, report
        self._policy = DecodePolicy.for_device()
        self._flat = FlatModel(self.model)
        self._plain: dict[tuple[int, int], DecodeRun] = {}
        self._inputs: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._caches: dict[tuple[int, int], Any] = {}
        self._programs: dict[Case, jax.stages.Compiled] = {}
        self._rows: dict[tuple, dict] = {}
        self._dials: dict[tuple, Dial] = {}

    def cases(self) -> list[Case]:
        """Returns all cases, the most important ones first."""
        cases = []
        for context, texts in itertools.product(self._args.contexts, self._args.batch):
            fitting = [
                drafts for drafts in (0, *self._args.drafts) if texts * (drafts + 1) <= MAX_GRADED_ROWS
            ]
            # The default number of drafts and no drafts first, more than the default last.
            fitting.sort(key=lambda drafts: (drafts > MOST_DRAFTS, 0 < drafts < MOST_DRAFTS, -drafts))
            cases.append(Case(context, texts, OFF))
            cases += [Case(context, texts, LOOKUP, drafts) for drafts in fitting]
        drafts = min(DECODED_DRAFTS, MAX_GRADED_ROWS // cases[0].texts - 1)
        if not self._args.no_self and drafts:
            cases.append(dataclasses.replace(cases[0], drafter=SELF, drafts=drafts))
        return cases

    def lowered(self) -> Iterator[tuple[Case, Callable[[], Any]]]:
        """Yields each case and the function that compiles its program."""
        for case in self.cases():
            yield case, self.lower(case)

    def lower(self, case: Case) -> Callable[[], Any]:
        """Lowers the program of a case; returns the function that compiles it."""
        key, bits = (case.context, case.texts), self._args.bits[0]
        if key not in self._plain:
            tokens = 2 * self._policy.chunk_steps
            self._plain[key] = DecodeRun(self.model, case.context, tokens, case.texts)
            room = self._args.steps * (1 + DRAFTS[-1]) + 16
            cache = measure.filled_cache(self.model, case.context, room, case.texts)
            size = case.texts, cache.capacity
            tokens = jax.random.randint(jax.random.key(1), size, 0, self.model.config.vocab_size)
            pending = jnp.zeros((case.texts, 4), jnp.float32).at[:, 3].set(ENDLESS)
            limits = jnp.full(case.texts, room, jnp.int32)
            self._caches[key] = cache
            self._inputs[key] = tokens[:, case.context], SlotTexts(tokens, pending), limits
        dial = Dial.create(self.model, random_model.TARGETS, [bits] * case.texts)
        if case.drafter == OFF:
            return self._plain[key].lower(dial)
        options = {"drafts": case.drafts, "steps": self._args.steps, "policy": self._policy}
        return run.lower(*self._arguments(case, dial, case.drafts), **options).compile

    def _arguments(self, case: Case, dial: Dial, verified: int) -> tuple[Any, ...]:
        key, drafter = (case.context, case.texts), AlwaysDrafts()
        if case.drafter == SELF:
            drafter = self._self_drafter
        lengths = jnp.full(case.texts, case.context, jnp.int32)
        cache = dataclasses.replace(self._caches[key], lengths=lengths)
        most = jnp.full(case.texts, verified, jnp.int32)
        return self._flat, cache, dial, *self._inputs[key], drafter, most

    @functools.cached_property
    def _self_drafter(self) -> Drafter:
        bits = jnp.float32(DEFAULT_SELF_BITS)
        return SelfDrafter(model_thresholds(self.model, jnp.array(random_model.TARGETS), bits))

    def measure(self, case: Case, bits: float) -> Iterator[dict]:
        """Times a case where all texts verify as many drafts as they can, and where none does.

        Yields:
          Each row when it is measured. A row that was measured before is overwritten.
        """
        for verified in sorted({case.drafts, 0}, reverse=True):
            if case.drafter == SELF and not verified:
                continue
            row = {"shape": self._label, "bits": bits, "context": case.context, "texts": case.texts}
            row |= {"drafter": case.drafter, "drafts": case.drafts, "verified": verified}
            key = tuple(row.values())
            if self._report.out_of_time(f"{self._label}, {case}, {verified} verified, {bits} bits"):
                continue
            row["us_per_step"] = round(self._microseconds(case, bits, verified), 1)
            if old := self._rows.get(key):
                old["us_per_step_while_compiling"] = old.pop("us_per_step")
                old |= row
            else:
                self._rows[key] = row
                self._report.fields["steps"].append(row)
            say(str(row))
            yield row

    def _microseconds(self, case: Case, bits: float, verified: int) -> float:
        call, steps = self._calls(case, bits, verified)
        return 1e6 / measure.timed_in_a_row(call, steps, self._args.repeats).mean

    def _calls(self, case: Case, bits: float, verified: int) -> tuple[Callable[[], Any], int]:
        """Returns a function that decodes, and the number of its steps."""
        dial = self._dial(case, bits)
        if case.drafter == OFF:
            plain = self._plain[case.context, case.texts]
            return lambda: plain.run(dial), plain.tokens
        return lambda: self._call(case, dial, verified), self._args.steps

    def _dial(self, case: Case, bits: float) -> Dial:
        """Returns a dial with which plain decoding reads these bits."""
        key = case.context, case.texts, bits
        if key not in self._dials:
            self._dials[key] = self._plain[key[:2]].settle(random_model.TARGETS, bits)
        return self._dials[key]

    def _call(self, case: Case, dial: Dial, verified: int) -> Any:
        program = self._programs[case]
        chunk, cache = program(*self._arguments(case, dial, verified))
        self._caches[case.context, case.texts] = cache
        return chunk.tokens

    def compiled(self, case: Case, program: Any) -> None:
        """Keeps the compiled program of a case."""
        if case.drafter != OFF:  # A run of plain decoding keeps its own.
            self._programs[case] = program

    def profile(self, case: Case, bits: float) -> dict | None:
        """Returns the table of one step in which all texts verify drafts; None on a CPU."""
        call, steps = self._calls(case, bits, case.drafts)
        kernels = step_profile.trace(call)
        if not kernels:
            return None
        span = self._microseconds(case, bits, case.drafts)
        program = (
            self._plain[case.context, case.texts].compiled if case.drafter == OFF else self._programs[case]
        )
        assert program is not None, "the case has run"
        linears = linear_names(self.model.config)
        table = step_profile.tabulate(kernels, steps, program.as_text(), linears, span)
        say(f"one step of {self._label}, {case}, {bits} bits:")
        print("\n".join(table.lines()), flush=True)
        return table.to_json()
