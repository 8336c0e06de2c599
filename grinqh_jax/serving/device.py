"""The engine's model and state on the device: compiles and dispatches the functions of ``decode_state``."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, bucket_widths
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.serving import decode_state
from grinqh_jax.serving.decode_state import DecodeState, Prefix
from grinqh_jax.serving.job import Shape
from grinqh_jax.serving.paged_cache import PagedCache
from grinqh_jax.serving.settings import Settings


class Device:
    """A model, and the state of all slots. Methods dispatch work and do not wait for it.

    Attributes:
      graded: Whether the model is graded.
    """

    def __init__(self, model: Decoder, dial: Dial | None, shape: Shape, policy: DecodePolicy):
        """Allocates the cache.

        Args:
          model: Graded model; or a dense one, with ``dial=None``.
          dial: Dial of the model; its state is ignored.
          shape: Sizes of the engine.
          policy: How programs are compiled.
        """
        self.graded = dial is not None
        self._config, self._shape, self._policy = model.config, shape, policy
        # The sharding of all arguments is the same from the first call on, because jit compiles again for
        # another one.
        self._sharding = model.norm.scale[...].sharding
        self._model, self._dial = FlatModel(model), self._put(dial)
        cache = PagedCache.create(model.config, shape.num_pages, shape.page_size, model.compute_dtype)
        self._state = self._put(
            DecodeState.create(
                cache, model.config, shape.slots, shape.pages_per_slot, shape.stop_tokens, self.graded
            )
        )

    def compile(self) -> None:
        """Compiles all programs by running them on no tokens. No slot may be in use."""
        settings = jax.tree.map(lambda rows: np.asarray(rows[:1]), self._state.slots.settings)
        for _ in range(2):  # The second time all inputs are outputs of the programs.
            for width in bucket_widths(max(self._shape.piece, engine.PREVIEW_TOKENS)):
                prefix = self.prefix([], 0)
                bucket = PrefillBucket(np.zeros((1, width), np.int32), np.zeros(1, np.int32), 0)
                for _ in range(2):  # A prefix without tokens, and one that a prefill returned.
                    if self._shape.prompt_logprobs:
                        self.prompt_logprobs(prefix, bucket, bucket.tokens)
                    prefix = self.prefill(prefix, bucket, settings)
            self.insert(0, prefix, [], settings)
            for greedy, logprobs in ((False, False), (True, False), (False, True)):
                self.generate(greedy, logprobs)
            if self.graded:
                self.turn(0, 0.0)
            self.free(0)
        jax.block_until_ready(self._state)

    def prefix(self, pages: Sequence[int], length: int) -> Prefix:
        """Returns the prefix of a text whose first ``length`` tokens are in shared pages."""
        row = np.full(self._shape.pages_per_slot, self._shape.num_pages, np.int32)
        row[: len(pages)] = pages
        return self._put(Prefix.create(self._config, row, length, self.graded))

    def prefill(self, prefix: Prefix, piece: PrefillBucket, settings: Settings) -> Prefix:
        """Reads the next piece of a prompt (see ``decode_state.prefill``)."""
        tokens, lengths, bits = self._put((piece.tokens, piece.lengths, settings.bits))
        cache, prefix = decode_state.prefill(
            self._model, self._state.cache, prefix, tokens, lengths, self._dial, bits
        )
        self._state = dataclasses.replace(self._state, cache=cache)
        return prefix

    def prompt_logprobs(
        self, prefix: Prefix, piece: PrefillBucket, following: Int[np.ndarray, "1 t"]
    ) -> TokenLogprobs:
        """Returns log-probabilities of a piece, before it is read (see ``decode_state.prompt_logprobs``)."""
        tokens, following = self._put((piece.tokens, following))
        cache, logprobs = decode_state.prompt_logprobs(
            self._model, self._state.cache, prefix, tokens, following
        )
        self._state = dataclasses.replace(self._state, cache=cache)
        return logprobs

    def insert(self, slot: int, prefix: Prefix, prompt: Sequence[int], settings: Settings) -> engine.Chunk:
        """Starts the answer to a prompt in a slot; returns its first token (see ``decode_state.insert``)."""
        in_prompt = np.zeros((1, self._config.vocab_size), bool)
        in_prompt[0, np.asarray(prompt, np.int32)] = True
        row, settings, in_prompt = self._put((np.int32(slot), settings, in_prompt))
        self._state, first = decode_state.insert(
            self._state, row, prefix, settings, in_prompt, self._dial, policy=self._policy
        )
        return first

    def generate(self, greedy: bool, logprobs: bool) -> engine.Chunk:
        """Decodes a chunk for all slots (see ``decode_state.generate``)."""
        self._state, chunk = decode_state.generate(
            self._model, self._state, self._dial, policy=self._policy, greedy=greedy, logprobs=logprobs
        )
        return chunk

    def turn(self, slot: int, bits: float) -> None:
        """Changes the wanted mean bits of an answer."""
        self._state = decode_state.turn(self._state, *self._put((np.int32(slot), np.float32(bits))))

    def free(self, slot: int) -> None:
        """Ends the answer in a slot."""
        self._state = decode_state.free(self._state, self._put(np.int32(slot)))

    def _put(self, arrays):
        return jax.device_put(arrays, self._sharding)
