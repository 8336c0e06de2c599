"""The answer to a request, as text that the engine's thread writes and any other thread or task reads."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.batching.job import FinishReason
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.speculation.figures import SpeculationFigures
from grinqh_jax.decoding.statistics import Statistics, grading_fields, joined
from grinqh_jax.memory import peak_memory
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.serving.errors import AnswerError, EngineError
from pallas_kernels import GradingStats


class TokenLogprob(NamedTuple):
    """Log-probability of a token in nats (see ``TokenLogprobs``).

    Attributes:
      token: Chosen token.
      logprob: Its log-probability.
      top: Most likely tokens and their log-probabilities, most likely first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """Part of an answer that arrived at once: its first token, a decode chunk, or the text held back last.

    Attributes:
      text: New text. It may be empty or belong to earlier tokens, because text that later tokens can change
        is held back.
      tokens: New tokens.
      logprobs: Log-probabilities of the tokens; None if the request does not ask for them.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None


class Answer:
    """Iterate over its pieces, with ``for`` or ``async for``, or wait for the whole text.

    A consumer that iterates later gets all pieces from the first one on.

    Attributes:
      prompt_tokens: Number of tokens of the prompt.
      prompt_logprobs: Log-probabilities of all prompt tokens but the first, from the first piece on; None if
        the request does not ask for them.
      tokens: Tokens so far. A stop token is included, tokens after a stop string are not.
      finish_reason: ``"stop"`` (stop token or stop string), ``"length"``, ``"cancelled"``, or None while
        unfinished.
      speculation: Figures of speculation; None without, and before the first token.
      reused_tokens: Number of leading prompt tokens taken from shared pages; None before the prompt is read.
    """

    def __init__(
        self,
        model: Decoder,
        prompt: Sequence[int],
        text: AnswerText,
        top_logprobs: int | None,
        *,
        one_level: bool = False,
        ranges: Float[np.ndarray, "linears"] | None = None,
    ):
        """Makes an empty answer.

        Args:
          model: Model that answers.
          prompt: Tokens of the prompt.
          text: Decodes the tokens.
          top_logprobs: Number of most likely tokens that pieces report; None for no log-probabilities.
          one_level: Whether decode steps read all channels of a layer at one level (``reading``).
          ranges: ``statistics.calibrated_ranges`` of the model; None for a dense one.
        """
        self.prompt_tokens = len(prompt)
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.reused_tokens: int | None = None
        self._one_level, self._ranges = one_level, ranges
        self.speculation: SpeculationFigures | None = None
        self._model = model
        self._prompt = prompt
        self._text = text
        self._top_logprobs = top_logprobs
        self._stats: list[GradingStats] = []
        self._pieces: list[Piece] = []
        self._times: list[float] = []  # beginning of the prompt, then arrivals of tokens
        self._error: EngineError | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(piece.text for piece in self._pieces)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the tokens so far; None if the request does not ask for them."""
        if self._top_logprobs is None:
            return None
        return [token for piece in self._pieces for token in piece.logprobs or ()]

    @property
    def grading_stats(self) -> GradingStats | None:
        """Statistics of every decode step so far, numpy ``[steps, linears]``; None before the first step.

        Layers are in the order of ``decoder.linear_names``.
        """
        return joined(self._stats)

    def result(self, timeout: float | None = None) -> str:
        """Waits for the end and returns the text.

        Args:
          timeout: Most seconds to wait; None for no limit.

        Raises:
          EngineError: The engine has failed or was closed; an ``AnswerError`` if the answer alone has failed.
          TimeoutError: The answer has not ended in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the answer has not ended after {timeout} s")
            self._raise_error()
            return self.text

    def statistics(self) -> Statistics:
        """Returns the figures so far, also of an unfinished answer.

        Times include those of other requests that the engine runs meanwhile, and no time in the queue.
        """
        times = self._times or [0.0]
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            reused_prompt_tokens=self.reused_tokens or 0,
            generated_tokens=len(self.tokens),
            prompt_seconds=times[min(1, len(times) - 1)] - times[0],
            generation_seconds=times[-1] - times[min(1, len(times) - 1)],
            compile_seconds=0.0,
            peak_memory_bytes=peak_memory(),
            speculation=self.speculation,
            **grading_fields(self._model, self.grading_stats, one_level=self._one_level, ranges=self._ranges),
        )

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces as they arrive.

        Raises:
          EngineError: The engine has failed or was closed; an ``AnswerError`` if the answer alone has failed.
        """
        position = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or len(self._pieces) > position)  # noqa: B023
                pieces, ended = self._pieces[position:], self._ended
            yield from pieces
            position += len(pieces)
            if ended:
                self._raise_error()
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yields the pieces as they arrive; no thread waits meanwhile.

        Raises:
          EngineError: The engine has failed or was closed; an ``AnswerError`` if the answer alone has failed.
        """
        loop, arrived, position = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(arrived.set)

        with self._changed:
            self._listeners.add(wake)
        try:
            while True:
                arrived.clear()
                with self._changed:
                    pieces, ended = self._pieces[position:], self._ended
                for piece in pieces:
                    yield piece
                position += len(pieces)
                if ended:
                    self._raise_error()
                    return
                await arrived.wait()
        finally:
            with self._changed:
                self._listeners.discard(wake)

    # The engine's thread calls the methods below.

    def begin(self, reused_tokens: int) -> None:
        """Records that the engine starts to read the prompt."""
        self.reused_tokens = reused_tokens
        self._times.append(time.perf_counter())

    def receive_prompt(self, logprobs: TokenLogprobs) -> None:
        """Takes the log-probabilities of all prompt tokens but the first, before the first piece."""
        self.prompt_logprobs = self._token_logprobs(self._prompt[1:], logprobs)

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
        """Adds tokens up to the first that ends the text; returns whether there is one."""
        text, count = self._text.push(tokens)
        tokens = tokens[:count]
        if stats is not None and count:
            self._stats.append(GradingStats(stats.packed[:count]))
        self._times.append(time.perf_counter())
        self.tokens += tokens
        self._publish(Piece(text, tokens, self._token_logprobs(tokens, logprobs)))
        return self._text.stopped

    def end(self, reason: FinishReason) -> None:
        """Ends the answer."""
        rest = self._text.flush()
        self.finish_reason = reason
        self._publish(
            Piece(rest, [], None if self._top_logprobs is None else []) if rest else None, ended=True
        )

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error, which every consumer gets."""
        if isinstance(error, EngineError):
            self._error = error
        else:
            self._error = AnswerError(f"the answer failed: {error!r}")
            self._error.__cause__ = error
        self._publish(None, ended=True)

    def _token_logprobs(
        self, tokens: Sequence[int], logprobs: TokenLogprobs | None
    ) -> list[TokenLogprob] | None:
        if logprobs is None or self._top_logprobs is None:
            return None
        chosen = logprobs.chosen[: len(tokens)].tolist()
        values, most_likely = (
            array[: len(tokens), : self._top_logprobs].tolist()
            for array in (logprobs.top, logprobs.top_tokens)
        )
        return [
            TokenLogprob(token, logprob, list(zip(*top, strict=True)))
            for token, logprob, *top in zip(tokens, chosen, most_likely, values, strict=True)
        ]

    def _publish(self, piece: Piece | None, ended: bool = False) -> None:
        with self._changed:
            if piece is not None:
                self._pieces.append(piece)
            self._ended |= ended
            self._changed.notify_all()
            listeners = list(self._listeners)
        for wake in listeners:
            wake()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise type(self._error)(str(self._error)) from self._error.__cause__
