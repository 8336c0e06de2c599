"""The answer to a request, as text that the engine's thread writes and any other thread or task reads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import jax
import numpy as np

from grinqh_jax.decoding.stop import StopStrings
from grinqh_jax.errors import GrinqhError
from grinqh_jax.serving.job import FinishReason
from grinqh_jax.text.stream import TextStream
from pallas_kernels import GradingStats


class EngineError(GrinqhError):
    """The engine has failed or was closed, so an answer is incomplete."""


class Answer:
    """Iterate over the pieces of the text, with ``for`` or ``async for``, or wait for all of it.

    A consumer that iterates later gets all pieces from the first one on.

    Attributes:
      tokens: Tokens so far, a stop token included.
      finish_reason: ``"stop"`` (stop token or stop string), ``"length"``, ``"cancelled"``, or None while
        unfinished.
      reused_tokens: Number of leading prompt tokens taken from shared pages; None before the prompt is read.
    """

    def __init__(self, stream: TextStream, stop: StopStrings):
        """Makes an empty answer.

        Args:
          stream: Decodes the tokens.
          stop: Stop strings of the request.
        """
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.reused_tokens: int | None = None
        self._stream = stream
        self._stop = stop
        self._stats: list[GradingStats] = []
        self._pieces: list[str] = []
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(self._pieces)

    @property
    def grading_stats(self) -> GradingStats | None:
        """Statistics of every decode step so far, numpy ``[steps, linears]``; None before the first step.

        Layers are in the order of ``decoder.linear_names``.
        """
        if not self._stats:
            return None
        return jax.tree.map(lambda *steps: np.concatenate(steps), *self._stats)

    def result(self, timeout: float | None = None) -> str:
        """Waits for the end and returns the text.

        Args:
          timeout: Most seconds to wait; None for no limit.

        Raises:
          EngineError: The engine has failed or was closed.
          TimeoutError: The answer has not ended in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the answer has not ended after {timeout} s")
            self._raise_error()
            return self.text

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces of the text as they arrive.

        Raises:
          EngineError: The engine has failed or was closed.
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

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yields the pieces of the text as they arrive; no thread waits meanwhile.

        Raises:
          EngineError: The engine has failed or was closed.
        """
        loop, arrived, position = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            if not loop.is_closed():
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

    def receive(self, tokens: list[int], stats: GradingStats | None) -> bool:
        """Adds tokens; returns whether a stop string has appeared."""
        if stats is not None and tokens:
            self._stats.append(stats)
        self.tokens += tokens
        self._publish(self._stop.push("".join(self._stream.push(token) for token in tokens)))
        return self._stop.met

    def end(self, reason: FinishReason) -> None:
        """Ends the answer."""
        self.finish_reason = reason
        rest = "" if self._stop.met else self._stop.push(self._stream.flush()) + self._stop.flush()
        self._publish(rest, ended=True)

    def fail(self, error: BaseException | None) -> None:
        """Ends the answer with an error of the engine."""
        self._error = error
        self._publish("", ended=True)

    def _publish(self, piece: str, ended: bool = False) -> None:
        with self._changed:
            if piece:
                self._pieces.append(piece)
            self._ended |= ended
            self._changed.notify_all()
            listeners = list(self._listeners) if piece or ended else []
        for wake in listeners:
            wake()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise EngineError(f"the engine ended before the answer: {self._error}") from self._error
