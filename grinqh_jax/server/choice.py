"""One of the answers to a request, and the parts of responses that all endpoints share."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from grinqh_jax.decoding.statistics import Statistics
from grinqh_jax.server.metrics import Clock
from grinqh_jax.serving.answer import Answer, Piece

LIVE_SECONDS = 0.5
"""Least time between two computations of the bits of an unfinished answer."""


@dataclasses.dataclass(eq=False)
class Choice:
    """An answer on its way to the client.

    Attributes:
      index: Index among the choices of the request.
      answer: The answer.
      clock: Times of its events.
      weights: Share of each linear layer (``dial.layer_shares``).
      statistics: Figures of the answer, once it has ended.
    """

    index: int
    answer: Answer
    clock: Clock
    weights: Float[np.ndarray, "linears"]
    statistics: Statistics | None = None
    _live_bits: float | None = None
    _live_time: float = 0.0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the pieces of the answer.

        Raises:
          EngineError: The engine or the answer has failed.
        """
        async for piece in self.answer:
            if piece.tokens:
                self.clock.event()
            yield piece
        self.clock.end()
        # In a thread, because a long answer has many steps.
        self.statistics = await asyncio.to_thread(self.answer.statistics)

    @property
    def realised_bits(self) -> float | None:
        """Mean bits read per weight, at most ``LIVE_SECONDS`` old; None for an unquantized model."""
        if self.statistics is not None:
            return self.statistics.realised_bits
        now = time.monotonic()
        if now - self._live_time > LIVE_SECONDS and (stats := self.answer.grading_stats) is not None:
            self._live_bits = float(np.asarray(stats.bits, np.float64).mean(axis=0) @ self.weights)
            self._live_time = now
        return self._live_bits

    @property
    def finish_reason(self) -> str | None:
        """Why the answer has ended, in the words of OpenAI's protocol; None before the end."""
        return self.answer.finish_reason


async def together(choices: Sequence[Choice], consume: Callable[[Choice], Awaitable[None]]) -> None:
    """Consumes all choices concurrently. The first exception ends all of them and is raised."""
    tasks = [asyncio.ensure_future(consume(choice)) for choice in choices]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(
    choices: Sequence[Choice],
    prompt_tokens: int,
    *,
    prompts: int = 1,
    answers: bool = True,
    layers: bool = False,
) -> dict[str, Any]:
    """Returns the usage of a request so far.

    Beside OpenAI's fields it has means over the answers: ``realised_bits`` (bits read per weight; None for an
    unquantized model), and ``weight_bytes_per_token`` of those that have ended.

    Args:
      choices: All choices.
      prompt_tokens: Number of tokens of the prompts, each counted once.
      prompts: Number of prompts, which have equally many choices.
      answers: Whether the client gets the answers.
      layers: Whether to add ``realised_bits_per_layer``, means over the ended answers.
    """
    generated = sum(len(choice.answer.tokens) for choice in choices) if answers else 0
    first = choices[:: len(choices) // prompts]  # of each prompt
    ended = [choice.statistics for choice in choices if choice.statistics is not None]
    figures: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.answer.reused_tokens or 0 for each in first)},
        "realised_bits": _mean([choice.realised_bits for choice in choices]),
        "weight_bytes_per_token": _mean([each.bytes_per_token for each in ended]),
    }
    if layers:
        each_bits = [each.realised_bits_per_layer for each in ended if each.realised_bits_per_layer]
        names = each_bits[0] if each_bits else ()
        figures["realised_bits_per_layer"] = {
            name: _mean([bits[name] for bits in each_bits]) for name in names
        }
    return figures


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
