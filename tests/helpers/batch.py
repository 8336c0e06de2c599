"""Decodes a batch of prompts with the decode loop, chunk by chunk."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.texts import Received, Texts


class Batch:
    """Texts that start together, by default one in each slot. Row b has the seed ``seed + b``.

    Attributes:
      rows: What has arrived of each text.
      chunks: Number of tokens in each decode chunk of each row, 1 for the first token.
      texts: The decode loop.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        *,
        bits="full",
        max_tokens: int,
        max_context: int,
        stop_tokens: Sequence[int] = (),
        policy: DecodePolicy | None = None,
        ended: Callable[[int, list[int]], bool] = lambda row, tokens: False,
        seed: int = 0,
        slots: int | None = None,
        speculation: Speculation | None = None,
        **sampling,
    ):
        self.rows = [Received() for _ in prompts]
        self.chunks: list[list[int]] = [[] for _ in prompts]
        jobs = []
        for row, (prompt, received) in enumerate(zip(prompts, self.rows, strict=True)):

            def has_ended(tokens, row=row, received=received):
                self.chunks[row].append(len(tokens))
                return ended(row, received.tokens)

            received._ended = has_ended
            limit = min(max_tokens, max_context - len(prompt))
            one = Sampling.on_host(1, seed=seed + row, **sampling)
            settings = Settings.of_request(one, generator.bits(bits), stop_tokens, limit)
            jobs.append(Job(list(prompt), settings, received))
        self.jobs = jobs
        self.texts = Texts(
            generator.model,
            generator.dial(bits),
            jobs[0].settings,
            capacity=max_context,
            slots=slots or len(prompts),
            policy=policy,
            speculation=speculation,
        )

    def compile(self, widths: Sequence[int]) -> None:
        """Compiles the programs for prompts of these bucket widths."""
        settings = self.jobs[0].settings
        Programs().compile(lowerings(self.texts.device, widths, settings, [(settings.greedy, False)]))

    def prefill(self) -> None:
        """Reads all prompts, until the first token of each row has arrived."""
        for job in self.jobs:
            self.texts.add(job)
        while not all(row.tokens for row in self.rows):
            self.texts.advance()

    def steps(self) -> Iterator[list[list[int]]]:
        """Yields the new tokens of all rows after each decode chunk that arrives."""
        while not self.texts.idle:
            before = [len(row.tokens) for row in self.rows]
            self.texts.advance()
            new = [row.tokens[start:] for row, start in zip(self.rows, before, strict=True)]
            if any(new):
                yield new
        self.texts.close()

    def run(self) -> list[list[int]]:
        """Returns all tokens of every row."""
        for job in self.jobs:
            self.texts.add(job)
        with contextlib.closing(self.texts):
            while not self.texts.idle:
                self.texts.advance()
        for row in self.rows:
            row.raise_error()
        return self.tokens

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens of every row so far."""
        return [row.tokens for row in self.rows]

    @property
    def bits(self) -> list[np.ndarray]:
        """Bits that each step and linear layer of every row read, ``[steps, linears]``."""
        return [np.concatenate([stats.bits for stats in row.stats]) for row in self.rows]

    @property
    def dial_state(self):
        """State of the dials after the work dispatched so far."""
        return self.texts.device._state.slots.dial
