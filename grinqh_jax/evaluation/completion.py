"""Completes many prompts, several at once: prefill at full precision, then graded decoding."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import CAPACITY_STEP, Generator
from grinqh_jax.decoding.model_files import prompt_too_long
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.decoding.texts import Received, Texts
from grinqh_jax.errors import UsageError
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels import GradingStats
from pallas_kernels.layout import round_up
from pallas_kernels.x64 import without_x64

MOST_SPECULATING = 4
"""Largest number of prompts that are decoded together with speculation: each has four rows of a step."""


class DecodedBits:
    """Adds up the bits that each linear layer reads over decode steps."""

    def __init__(self):
        self._sums: Any = 0.0  # float64 [linears] once something is added
        self._tokens = 0

    def add(self, stats: GradingStats) -> None:
        """Adds the bits of decode steps ``[steps, linears]``."""
        self._sums = self._sums + np.sum(stats.bits, axis=0, dtype=np.float64)
        self._tokens += len(stats.bits)

    def mean(self, model: Decoder, *, head: bool = True) -> float | None:
        """Returns the mean bits read per weight; None if nothing was graded.

        Args:
          model: Model that decoded.
          head: Whether to include the output projection.
        """
        if not self._tokens:
            return None
        by_name = zip(linear_names(model.config), (self._sums / self._tokens).tolist(), strict=True)
        return float(weighted_mean(model, {n: bits for n, bits in by_name if head or not in_head(n)}))


@dataclasses.dataclass(frozen=True)
class Completions:
    """Generated texts in the order of their prompts, and the bits that decoding read."""

    texts: list[str]
    bits: DecodedBits


@without_x64
def complete(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    bits: Bits,
    *,
    max_tokens: int,
    batch: int,
    ended: Callable[[str], bool],
    sampling: Mapping[str, Any] | None = None,
    speculation: Speculation | None = None,
    on_progress: Callable[[int], Any] = lambda prompts: None,
) -> Completions:
    """Completes every prompt.

    Prompts are read at full precision; decoding is graded. A completion ends with a stop token of the model,
    after ``max_tokens`` tokens, or when ``ended`` returns true. Another setting of the dial compiles nothing.

    Args:
      generator: Model and tokenizer.
      prompts: Tokens of each prompt. There is at least one prompt.
      bits: Setting of the dial.
      max_tokens: Largest number of tokens per completion.
      batch: Largest number of prompts decoded together. When a completion ends, the next prompt takes its
        place.
      ended: Predicate on the text generated so far, called after every decode chunk. True ends the
        completion.
      speculation: How to speculate, by default not at all. At most ``MOST_SPECULATING`` prompts are then
        decoded together, so that rows are left for drafts.
      sampling: Parameters of ``Sampling.create``; greedy by default.
      on_progress: Called with the number of completions that have ended since the last call.

    Raises:
      UsageError: ``bits`` are out of the dial's range; a prompt is empty, longer than the model's context, or
        has a token outside the vocabulary.
    """
    model = generator.model
    context = model.config.max_position_embeddings
    for prompt in prompts:
        model.config.check_tokens(prompt)
        if not prompt:
            raise UsageError("a prompt has no tokens; give at least one")
        if len(prompt) >= context:
            raise prompt_too_long(len(prompt), context)
    if speculation is not None:
        batch = min(batch, MOST_SPECULATING)
    batches = -(-len(prompts) // batch)
    batch = -(-len(prompts) // batches)
    # Sorted by length, so that the longest completions do not start last.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts, counter = [""] * len(prompts), DecodedBits()
    received: list[Received] = []

    def receiver(i: int) -> Received:
        def has_ended(_: list[int]) -> bool:
            texts[i] = generator.tokenizer.decode(one.tokens)
            return ended(texts[i])

        one = Received(has_ended)
        received.append(one)
        return one

    def settings(row: int, prompt: int) -> Settings:
        parameters = dict(sampling or {})
        parameters["seed"] = parameters.get("seed", 0) + row
        one = Sampling.on_host(1, **parameters)
        limit = min(max_tokens, context - prompt)
        return Settings.of_request(one, generator.bits(bits), generator.defaults.eos_tokens, limit)

    jobs = [Job(prompts[i], settings(n % batch, len(prompts[i])), receiver(i)) for n, i in enumerate(order)]
    needed = max(len(job.prompt) + job.limit for job in jobs)
    capacity = min(round_up(needed, CAPACITY_STEP), context)
    loop = Texts(
        model, generator.dial(bits), jobs[0].settings, capacity=capacity, slots=batch, speculation=speculation
    )
    with contextlib.closing(loop):
        for job in jobs:
            loop.add(job)
        ended_before = 0
        while not loop.idle:
            loop.advance()
            ended_now = sum(one.reason is not None for one in received)
            if ended_now > ended_before:
                on_progress(ended_now - ended_before)
                ended_before = ended_now
            for one in received:
                one.raise_error()
                for stats in one.stats:
                    counter.add(stats)
                one.stats.clear()  # Those of a whole evaluation would fill the memory.
    return Completions(texts, counter)
