"""The settings of the requests in the slots, as arrays, so that another request compiles nothing."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.penalties import Penalties
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


def sampling_rows(
    batch: int,
    vocabulary: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Float[np.ndarray, "v"] | None = None,
) -> Sampling:
    """Returns the same sampling parameters for every row, as numpy arrays (see ``Sampling.create``).

    In contrast to ``Sampling.create`` there always are penalties and biases, and ``greedy`` is False, so that
    all requests have the same structure.
    """

    def rows(value, dtype):
        return np.full(batch, value, dtype)

    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    biases: Any = np.zeros((batch, vocabulary), np.float32)
    if logit_bias is not None:
        biases += logit_bias
    return Sampling(
        temperature=rows(temperature, np.float32),
        top_k=rows(top_k, np.int32),
        top_p=rows(top_p, np.float32),
        min_p=rows(min_p, np.float32),
        seed=rows(seed % 2**32, np.uint32),
        penalties=Penalties(*(rows(value, np.float32) for value in penalties)),
        logit_bias=biases,
    )
