"""Texts that are decoded in the caller's thread, several at once, and share nothing."""

from collections.abc import Callable
from typing import Literal

from grinqh_jax.decoding.batching.job import FinishReason, Job, Storage
from grinqh_jax.decoding.batching.rows import Rows
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import contiguous_shape
from grinqh_jax.decoding.speculation.figures import SpeculationFigures
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.model.decoder import Decoder
from pallas_kernels import GradingStats


class Received:
    """Collects the tokens and figures of a text: a ``job.Receiver``.

    Attributes:
      tokens: Tokens so far.
      stats: Grading statistics of each decode chunk, numpy ``[tokens, linears]``.
      seconds: Time of the prompt, then of each decode chunk (see ``job.Receiver.receive``).
      reason: Why the text has ended; None while it has not.
      speculation: Figures of speculation; None without, and before the first token.
    """

    def __init__(self, ended: Callable[[list[int]], bool] = lambda tokens: False):
        """Makes an empty text.

        Args:
          ended: Called with the new tokens of a decode chunk, after they were added; returns whether the text
            ends with them.
        """
        self.tokens: list[int] = []
        self.stats: list[GradingStats] = []
        self.seconds: list[float] = []
        self.reason: Literal["stop", "length"] | None = None
        self.speculation: SpeculationFigures | None = None
        self._ended = ended
        self._error: Exception | None = None

    def begin(self, reused_tokens: int) -> None:
        """Does nothing."""

    def receive_prompt(self, logprobs: TokenLogprobs) -> None:
        """Does nothing: these texts have no log-probabilities."""

    def receive_speculation(self, figures: SpeculationFigures) -> None:
        """Remembers the figures of speculation."""
        self.speculation = figures

    def receive(
        self,
        tokens: list[int],
        stats: GradingStats | None,
        logprobs: TokenLogprobs | None,
        seconds: float,
    ) -> bool:
        """Adds tokens; returns whether the text ends with them."""
        self.tokens += tokens
        self.seconds.append(seconds)
        if stats is not None:
            self.stats.append(stats)
        return self._ended(tokens)

    def end(self, reason: FinishReason) -> None:
        """Remembers the reason."""
        assert reason != "cancelled", "nobody cancels these texts"
        self.reason = reason

    def fail(self, error: Exception) -> None:
        """Remembers an exception of ``ended`` for ``raise_error``."""
        self._error = error

    def raise_error(self) -> None:
        """Raises the exception of ``ended``, if there was one."""
        if self._error is not None:
            raise self._error


class Texts:
    """The decode loop for texts that share nothing, with a contiguous cache.

    Attributes:
      device: State of all slots.
    """

    def __init__(
        self,
        model: Decoder,
        dial: Dial | None,
        settings: Settings,
        *,
        capacity: int,
        slots: int = 1,
        storage: Storage | None = None,
        cache: PagedCache | None = None,
        policy: DecodePolicy | None = None,
        rings: bool = True,
        speculation: Speculation | None = None,
    ):
        """Prepares the loop and reads no token yet.

        Args:
          model: Graded model; or a dense one, with ``dial=None``.
          dial: Dial of the model; its state is ignored.
          settings: Settings of one text; those of all texts have the same structure.
          capacity: Largest number of tokens of a prompt and its text together.
          slots: Number of texts that are decoded at once. Free slots get their prompts before the next chunk.
          storage: Storage of the texts, by default ``Rows``.
          cache: Cache of the texts, by default an empty one.
          policy: How programs are compiled and chunks scheduled, by default ``DecodePolicy.for_device()``.
          rings: See ``Shape``. Must be false if ``storage`` gives a text the prefix of another one.
          speculation: How to speculate, if at all. There are no rings then, because the rounding of their
            attention on a CPU follows the number of new tokens.
        """
        policy = policy or DecodePolicy.for_device()
        shape = contiguous_shape(capacity, slots, rings and speculation is None)
        self.device = Device(model, dial, shape, policy, settings, cache, speculation=speculation)
        self._scheduler = Scheduler(self.device, storage or Rows(), policy, prompts_first=True)
        self._more_due = False

    def add(self, job: Job) -> None:
        """Queues a text."""
        self._scheduler.add(job)

    @property
    def idle(self) -> bool:
        """Whether all texts have ended, and nothing is in flight."""
        return self._scheduler.idle

    def advance(self) -> None:
        """Dispatches work if nothing is due, and delivers one result: first tokens or a decode chunk."""
        if not self._more_due:
            self._scheduler.dispatch()
        self._more_due = self._scheduler.deliver()

    def close(self) -> None:
        """Ends the thread that waits for results."""
        self._scheduler.close()
