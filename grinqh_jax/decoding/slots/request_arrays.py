"""Puts the arrays of a request on the device. What most requests have in common is put there once.

Each array is a transfer of its own, and those with an entry for each token of the vocabulary are large:
biases take 0.6 MB for a vocabulary of 150,000 tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt32

from grinqh_jax.decoding.slots import host_arrays
from grinqh_jax.decoding.slots.placement import Placement
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.fixed_states import FixedStates, fixed_states
from grinqh_jax.sharding.program import zeros_on_mesh


class RequestArrays:
    """Puts the arrays of requests on the device.

    Attributes:
      slots: Number of each slot, on the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        settings: Settings,
        graded: bool,
        placement: Placement,
        cache_config: ModelConfig,
        dtype: Any,
    ):
        """Puts on the device what requests have in common.

        Args:
          config: Configuration of the model.
          shape: Sizes of the engine.
          settings: Settings of one request; those of all requests have the same structure.
          graded: Whether the model is graded.
          placement: Where arrays are.
          cache_config: Configuration of the cache (``Decoder.cache_config``).
          dtype: Dtype of states of a fixed size.
        """

        def fixed() -> FixedStates:
            return fixed_states(cache_config, 1, dtype, shape.ring_context)

        self._shape, self._vocabulary = shape, config.vocab_size
        self._put = placement.put
        empty = jax.eval_shape(fixed) if placement.abstract else zeros_on_mesh(fixed, placement.partition)
        pages = np.full(shape.pages_per_slot, shape.num_pages, np.int32)
        self.slots: list[Any] = self._put([np.int32(slot) for slot in range(shape.slots)])
        self._unread: Prefix = self._put(Prefix.create(config, pages, 0, graded, empty))
        biases, no_tokens, every_token = settings.sampling.logit_bias, None, None
        if settings.sampling.penalties is not None:
            no_tokens = host_arrays.in_prompt([], config.vocab_size)
        if shape.grammars:
            every_token = host_arrays.masks(1, config.vocab_size, {})
        no_biases = None if biases is None else np.zeros_like(biases)
        self._no_biases, self._no_tokens, self._every_token = self._put((no_biases, no_tokens, every_token))

    def prefix(self, pages: Sequence[int], length: int, fixed: FixedStates | None) -> Prefix:
        """Returns the prefix of a text (arguments: see ``Device.prefix``)."""
        row = np.full((1, self._shape.pages_per_slot), self._shape.num_pages, np.int32)
        row[0, : len(pages)] = pages
        read, own, fixed = self._put((np.array([length], np.int32), row, fixed or None))
        return dataclasses.replace(self._unread, pages=own, length=read, fixed=fixed or self._unread.fixed)

    def of_answer(
        self,
        settings: Settings,
        prompt: Sequence[int],
        allowed: UInt32[np.ndarray, "words"] | None,
        padded: int | None,
    ) -> tuple[Settings, Any, Any, Any]:
        """Returns the settings of an answer, which tokens its prompt has, which ones may come first, and its
        prompt, as ``answers.insert`` takes them.

        Args:
          settings: Settings, numpy.
          prompt: Tokens of the prompt.
          allowed: Tokens that may come first; None for all.
          padded: Number of tokens that the prompt is padded to; None for no prompt.
        """
        has = None
        if settings.has_repetition_penalty:  # No other penalty counts the prompt.
            has = host_arrays.in_prompt(prompt, self._vocabulary)
        first = None if allowed is None else allowed[None]
        tokens = None if padded is None else host_arrays.padded(prompt, padded)
        biases = settings.sampling.logit_bias if settings.has_biases else None
        small = dataclasses.replace(settings.sampling, logit_bias=biases)
        sent = dataclasses.replace(settings, sampling=small), has, first, tokens
        sent_settings, has, first, tokens = self._put(sent)
        if biases is None:
            sampling = dataclasses.replace(sent_settings.sampling, logit_bias=self._no_biases)
            sent_settings = dataclasses.replace(sent_settings, sampling=sampling)
        has, first = self._no_tokens if has is None else has, self._every_token if first is None else first
        return sent_settings, has, first, tokens
