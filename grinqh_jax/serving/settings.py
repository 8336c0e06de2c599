"""The settings of the requests in the slots, as arrays, so that another request compiles nothing."""

import dataclasses
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
      sampling: Sampling parameters, with penalties, biases and ``greedy=False``, so that any request fits.
      bits: float32 ``[B]``, wanted mean bits; ignored for a dense model.
      stop_tokens: int32 ``[B, E]``, tokens that end an answer, padded with ``NO_TOKEN``.
      limits: int32 ``[B]``, number of tokens that the request may still generate.
    """

    sampling: Sampling
    bits: Float[Array, "b"]
    stop_tokens: Int[Array, "b e"]
    limits: Int[Array, "b"]


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
