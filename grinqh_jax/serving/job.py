"""A request on its way through the scheduler, and the sizes of the engine that runs it."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.prefill_buckets import PrefillBucket
from grinqh_jax.errors import GrinqhError, UsageError
from grinqh_jax.serving.decode_state import Prefix
from grinqh_jax.serving.settings import Settings
from pallas_kernels import GradingStats


class EngineError(GrinqhError):
    """The engine has failed or was closed, or an answer has failed, and is incomplete."""


FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the engine's programs and of its cache.

    Attributes:
      slots: Number of requests that are decoded at once.
      max_context: Most tokens of a prompt and its answer together.
      page_size: Number of positions of a page.
      piece: Number of prompt tokens read in one call, a multiple of ``page_size``.
      num_pages: Number of pages of the cache.
      stop_tokens: Most stop tokens of a request.
      prompt_logprobs: Whether requests may have log-probabilities of their prompts.

    Raises:
      UsageError: ``piece`` is not a multiple of ``page_size``.
    """

    slots: int
    max_context: int
    page_size: int
    piece: int
    num_pages: int
    stop_tokens: int
    prompt_logprobs: bool

    def __post_init__(self):
        if self.piece % self.page_size:
            raise UsageError(
                f"a piece of {self.piece} tokens is not a multiple of the page size {self.page_size}; choose "
                "such a multiple"
            )

    @property
    def pages_per_slot(self) -> int:
        """Number of pages of a text of ``max_context`` tokens."""
        return -(-self.max_context // self.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """How much of the engine is in use at the moment.

    Attributes:
      waiting: Number of requests that wait for a slot or for pages.
      reading: Number of requests whose prompts are being read.
      decoding: Number of requests whose answers are being decoded.
      slots: Number of requests that can be read or decoded at once.
      pages: Number of pages of the cache.
      pages_in_use: Number of pages that requests use.
      pages_kept: Number of unused pages that hold prefixes for later requests.
      pages_evicted: Number of prefix pages that other texts have taken so far.
      prompt_tokens: Number of prompt tokens of all requests that left the queue so far.
      reused_tokens: Number of these that came from shared pages.
    """

    waiting: int
    reading: int
    decoding: int
    slots: int
    pages: int
    pages_in_use: int
    pages_kept: int
    pages_evicted: int
    prompt_tokens: int
    reused_tokens: int


@runtime_checkable
class Receiver(Protocol):
    """Takes the answer to a job."""

    def begin(self, reused_tokens: int) -> None:
        """Is called when the job leaves the queue, with the number of prompt tokens from shared pages."""

    def receive_prompt(self, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities of all prompt tokens but the first, numpy ``[tokens]``."""

    def receive(self, tokens: list[int], stats: GradingStats | None, logprobs: TokenLogprobs | None) -> bool:
        """Takes new tokens; returns whether a stop token or a stop string is among them.

        Args:
          tokens: New tokens.
          stats: Their grading statistics, numpy ``[tokens, linears]``; None for the first token, which a
            prefill at full precision yields, and for a dense model.
          logprobs: Their log-probabilities, numpy ``[tokens]``; None if the job does not want them.
        """

    def end(self, reason: FinishReason) -> None:
        """Is called at the end."""

    def fail(self, error: EngineError, cause: BaseException | None) -> None:
        """Is called after an exception of another method, and ends the answer."""


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
      pages: Pages of the text, shared ones first, once the job is admitted.
      slot: Slot of the job, once it is admitted.
      ended: Whether the answer has ended.
      prefix: What has been read of the prompt; None before and after.
      pieces: Pieces of the prompt that are not read yet.
      prompt_results: Log-probabilities of the pieces read so far, on the device, and their numbers of tokens.
      dispatched: Number of tokens that the dispatched work generates, unless a stop token comes first.
    """

    prompt: Sequence[int]
    settings: Settings
    answer: Receiver
    logprobs: bool = False
    prompt_logprobs: bool = False
    priority: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    ended: bool = False
    prefix: Prefix | None = None
    pieces: collections.deque[PrefillBucket] = dataclasses.field(default_factory=collections.deque)
    prompt_results: list[tuple[TokenLogprobs, int]] = dataclasses.field(default_factory=list)
    dispatched: int = 0

    @property
    def limit(self) -> int:
        """Most tokens of the answer."""
        return int(self.settings.limits[0])

    @functools.cached_property
    def greedy(self) -> bool:
        """Whether the answer is decoded greedily, without penalties and biases."""
        sampling, penalties = self.settings.sampling, self.settings.sampling.penalties
        assert penalties is not None, "settings of a slot have penalties"
        assert sampling.logit_bias is not None, "settings of a slot have biases"
        penalized = penalties.presence[0] or penalties.frequency[0] or penalties.repetition[0] != 1
        return not (sampling.temperature[0] > 0 or penalized or sampling.logit_bias.any())
