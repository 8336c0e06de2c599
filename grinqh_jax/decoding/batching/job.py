"""A request on its way through the scheduler, and the protocols of what the scheduler works with."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32

from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.prefill_buckets import PrefillBucket
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.speculation.draft_length import Acceptance
from grinqh_jax.decoding.speculation.figures import SpeculationFigures
from grinqh_jax.model.fixed_states import FixedStates
from pallas_kernels import GradingStats

FinishReason = Literal["stop", "length", "cancelled"]


@runtime_checkable
class Receiver(Protocol):
    """Takes the answer to a job."""

    def begin(self, reused_tokens: int) -> None:
        """Is called when the job leaves the queue, with the number of prompt tokens from shared pages."""

    def receive_prompt(self, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities of all prompt tokens but the first, numpy ``[tokens]``."""

    def receive_speculation(self, figures: SpeculationFigures) -> None:
        """Takes the figures of speculation, which grow with the answer, before the first token."""

    def receive(
        self,
        tokens: list[int],
        stats: GradingStats | None,
        logprobs: TokenLogprobs | None,
        seconds: float,
    ) -> bool:
        """Takes new tokens; returns whether the answer ends with them before its limit.

        Args:
          tokens: New tokens.
          stats: Their grading statistics, numpy ``[tokens, linears]``; None for the first token, which a
            prefill at full precision yields, and for a dense model.
          logprobs: Their log-probabilities, numpy ``[tokens]``; None if the job does not want them.
          seconds: Time that the device took for the decode chunk, or for the prompt and the first token. It
            includes the work for other jobs, but no time in which nobody waited for the device.
        """

    def end(self, reason: FinishReason) -> None:
        """Is called at the end."""

    def fail(self, error: Exception) -> None:
        """Is called after an exception of another method, and ends the answer."""


@runtime_checkable
class TokenGrammar(Protocol):
    """Decides which token may come next. An exception ends the answer with an error."""

    def allowed(self) -> UInt32[np.ndarray, "words"]:
        """Returns the tokens that may come next (see ``sampling.Sampling.allowed``)."""

    def push(self, token: int) -> bool:
        """Adds a token; returns whether the answer ends with it."""


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its way through the scheduler.

    Attributes:
      prompt: Tokens of the prompt.
      settings: Settings, numpy with one row; ``limits`` is the length of the longest answer.
      answer: Receiver of the answer.
      logprobs: Whether the answer has log-probabilities.
      prompt_logprobs: Whether the prompt has log-probabilities. It then shares no pages of earlier requests.
      priority: Jobs with a lower number come first; jobs with the same number in the order of their arrival.
      grammar: Grammar of the answer; None for any text. Meanwhile decode chunks have one step, because the
        host computes the mask of each token from the tokens before.
      pages: Pages of the text, shared ones first, once the job is admitted.
      fixed: States of a fixed size after the tokens that are reused; None if there are none.
      slot: Slot of the job, once it is admitted.
      ended: Whether the answer has ended.
      prefix: What has been read of the prompt; None before and after.
      buckets: Buckets of the prompt that are not read yet.
      turned: Mean bits that a client wanted while the prompt was being read; None for those of the settings.
      prompt_results: Log-probabilities of the prefill chunks read so far, on the device, and their numbers
        of tokens.
      admitted: Time at which the job got its slot.
      dispatched: Number of tokens that the dispatched work generates at least, unless a stop token comes
        first.
      acceptance: Estimates for the number of drafts.
      figures: What speculation did for the answer.
    """

    prompt: Sequence[int]
    settings: Settings
    answer: Receiver
    logprobs: bool = False
    prompt_logprobs: bool = False
    priority: int = 0
    grammar: TokenGrammar | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    fixed: FixedStates | None = None
    slot: int | None = None
    ended: bool = False
    prefix: Prefix | None = None
    buckets: collections.deque[PrefillBucket] = dataclasses.field(default_factory=collections.deque)
    turned: float | None = None
    prompt_results: list[tuple[TokenLogprobs, int]] = dataclasses.field(default_factory=list)
    admitted: float = 0.0
    dispatched: int = 0
    acceptance: Acceptance = dataclasses.field(default_factory=Acceptance)
    figures: SpeculationFigures = dataclasses.field(default_factory=SpeculationFigures)

    @property
    def limit(self) -> int:
        """Most tokens of the answer."""
        return int(self.settings.limits[0])

    @functools.cached_property
    def greedy(self) -> bool:
        """Whether the answer is decoded greedily, without penalties and biases."""
        return self.settings.greedy


@runtime_checkable
class Storage(Protocol):
    """Decides where the keys and values of a text are, and which tokens of a prompt are read."""

    def reserve(self, job: Job) -> int | None:
        """Sets the pages of a job that has a slot.

        Returns:
          Number of leading tokens of the prompt whose keys and values are in the pages already; None, and no
          page is taken, if the text does not fit now.
        """

    def cut(self, job: Job, start: int) -> Iterator[PrefillBucket]:
        """Yields the buckets of a prompt from position ``start`` on."""

    def keep(self, job: Job, end: int) -> None:
        """Is called after the dispatch of a prefill chunk, up to ``end``. Later jobs may reuse its pages."""

    def release(self, job: Job) -> None:
        """Gives up the pages of a job."""
