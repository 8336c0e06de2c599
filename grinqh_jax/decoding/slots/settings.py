"""The settings of the requests in the slots, as arrays, so that another request compiles nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.penalties import NEUTRAL, Penalties
from grinqh_jax.decoding.sampling import Sampling

NO_TOKEN = -1
"""Padding of stop tokens; no token has this id."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the requests in B slots, or of one request (B = 1).

    Attributes:
      sampling: Sampling parameters. Those of an engine have penalties, biases and ``greedy=False``, so that
        any request fits (``sampling_rows``).
      bits: float32 ``[B]``, wanted mean bits; ignored for a dense model.
      stop_tokens: int32 ``[B, E]``, tokens that end an answer, padded with ``NO_TOKEN``.
      limits: int32 ``[B]``, number of tokens that the request may still generate.
    """

    sampling: Sampling
    bits: Float[Array, "b"]
    stop_tokens: Int[Array, "b e"]
    limits: Int[Array, "b"]

    @classmethod
    def of_request(
        cls,
        sampling: Sampling,
        bits: float | None,
        stop_tokens: Sequence[int],
        limit: int,
        most_stop_tokens: int | None = None,
    ) -> "Settings":
        """Returns the settings of one request, as numpy arrays.

        Args:
          sampling: Sampling parameters, numpy with one row.
          bits: Wanted mean bits; None for a dense model.
          stop_tokens: Tokens that end the answer.
          limit: Largest number of tokens of the answer.
          most_stop_tokens: Number of stop tokens that all requests have room for; by default those of this
            request, at least one.
        """
        room = max(len(stop_tokens), 1) if most_stop_tokens is None else most_stop_tokens

        def row(value, dtype) -> Any:
            return np.array([value], dtype)

        return cls(
            sampling=sampling,
            bits=row(bits or 0, np.float32),
            stop_tokens=row([*stop_tokens, *[NO_TOKEN] * (room - len(stop_tokens))], np.int32),
            limits=row(limit, np.int32),
        )

    @property
    def greedy(self) -> bool:
        """Whether one request, numpy, is decoded greedily, without penalties, biases and masks."""
        sampling, penalties = self.sampling, self.sampling.penalties
        if sampling.allowed is not None or self.has_repetition_penalty or self.has_biases:
            return False
        if penalties is not None and (penalties.presence[0] or penalties.frequency[0]):
            return False
        return not sampling.temperature[0] > 0

    @property
    def has_repetition_penalty(self) -> bool:
        """Whether one request, numpy, has a repetition penalty, which also counts the prompt's tokens."""
        penalties = self.sampling.penalties
        return penalties is not None and bool(penalties.repetition[0] != 1)

    @property
    def has_biases(self) -> bool:
        """Whether one request, numpy, has biases."""
        biases = self.sampling.logit_bias
        return biases is not None and bool(np.asarray(biases).any())


def sampling_rows(batch: int, vocabulary: int, **parameters: Any) -> Sampling:
    """Returns ``Sampling.on_host(batch, **parameters)`` with the structure that all requests share.

    There always are penalties and biases, and ``greedy`` is False.
    """
    sampling = Sampling.on_host(batch, **parameters)
    biases: Any = np.zeros((batch, vocabulary), np.float32)
    return dataclasses.replace(
        sampling,
        greedy=False,
        penalties=sampling.penalties or Penalties.on_host(batch, *NEUTRAL.values()),
        logit_bias=biases if sampling.logit_bias is None else sampling.logit_bias,
    )
