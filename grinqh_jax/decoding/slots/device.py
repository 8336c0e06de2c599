"""The model and its state on the device: dispatches the programs of all slots."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt32

from grinqh_jax.decoding import reading
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.logprobs import MOST_LOGPROBS
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import PrefillBucket
from grinqh_jax.decoding.slots import answers, host_arrays, prompts, speculate
from grinqh_jax.decoding.slots.announced import announced
from grinqh_jax.decoding.slots.placement import Placement
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.slots.request_arrays import RequestArrays
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.slots.state import DecodeState
from grinqh_jax.decoding.slots.step_shapes import StepShape, row_counts, rows_are_independent, step_shapes
from grinqh_jax.decoding.speculation import block_dial
from grinqh_jax.decoding.speculation.speculation import Speculation, check_speculation
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.fixed_states import FixedStates
from grinqh_jax.model.flat_model import FlatModel
from pallas_kernels.layout import DIGIT_BITS


class Device:
    """A model, and the state of all slots. Methods dispatch work and do not wait for it.

    A device that only records its programs returns None in place of chunks (see ``rehearsal``).

    Attributes:
      shape: Sizes of state and programs.
      graded: Whether the model is graded.
      on_mesh: Whether the model is cut among devices.
      levels: Values of the argument ``level`` of ``generate``.
      speculation: How the device speculates; None if it does not.
      step_shapes: Shapes of steps, that of all slots without drafts first. It alone has a program for masks.
        Chunks with log-probabilities decode all slots.
      on_call: Callback before each call that starts programs, with its name and arguments; None for none.
      on_prefix: Callback for each prefix that a call returns; None for none.
    """

    on_call: Callable[[str, tuple[Any, ...]], None] | None = None
    on_prefix: Callable[[Prefix], None] | None = None

    def __init__(
        self,
        model: Decoder,
        dial: Dial | None,
        shape: Shape,
        policy: DecodePolicy,
        settings: Settings,
        cache: PagedCache | None = None,
        *,
        speculation: Speculation | None = None,
        abstract: bool = False,
    ):
        """Makes a state of empty slots.

        Args:
          model: Graded model; or a dense one, with ``dial=None``.
          dial: Dial of the model; its state is ignored.
          shape: Sizes of the engine.
          policy: How programs are compiled.
          settings: Settings of one request; those of all requests have the same structure.
          cache: Pages of all texts, of the same shape; by default empty ones.
          speculation: How to speculate, if at all.
          abstract: Whether to allocate nothing, and run nothing (see ``rehearsal.lowerings``).

        Raises:
          UsageError: There is speculation, and the cache of the model cannot be rolled back, or there are too
            many slots.
        """
        self.shape = shape
        self.graded, self.on_mesh = dial is not None, model.partition is not None
        self.speculation = speculation
        if speculation is not None:
            check_speculation(model.config, shape.slots, shape.contiguous)
            dial = None if dial is None else block_dial.in_blocks(dial)
        self._config, self._policy = model.config, policy
        self._top_logprobs = min(MOST_LOGPROBS, model.config.vocab_size)
        self._num_planes = model.full_bits // DIGIT_BITS if self.graded else 0
        # Evaluation grades every token of texts that share nothing, for any number of texts.
        graded_rows = shape.contiguous or not self.graded
        self.levels = [None] if graded_rows else reading.possible_levels(shape.slots, self._num_planes)
        # A dense product may round differently for another number of rows, so an answer would depend on load.
        counts = row_counts(shape.slots, fixed=graded_rows or not rows_are_independent(model.config))
        most_drafts = 0 if speculation is None else speculation.most_drafts
        self.step_shapes: list[StepShape] = step_shapes(counts, most_drafts, shape.contiguous)
        self._placement = Placement.of_model(model, abstract)
        self._model, self._dial = FlatModel(model), self._put(dial)
        self._drafter = self._put(None if speculation is None else speculation.drafter)
        sizes = self._placement, model.cache_config, model.compute_dtype
        self._requests = RequestArrays(model.config, shape, settings, self.graded, *sizes)
        self._last_rows: tuple[tuple[int, ...], Any] = (), None

        def state() -> DecodeState:
            drafter = None if speculation is None else speculation.drafter
            return DecodeState.create(
                model, shape, settings, graded=self.graded, cache=cache, drafter=drafter
            )

        self._state = self._put(jax.eval_shape(state) if abstract else state())

    @property
    def cache(self) -> PagedCache:
        """Pages of all texts, after the work dispatched so far. The next call of a method donates them."""
        return self._state.cache

    def wait(self) -> None:
        """Waits for all work that was dispatched."""
        jax.block_until_ready(self._state)

    @announced
    def prefix(self, pages: Sequence[int], length: int, fixed: FixedStates | None = None) -> Prefix:
        """Returns the prefix of a text whose first ``length`` tokens are in its pages already.

        Args:
          pages: Pages of the text.
          length: Number of tokens that are reused.
          fixed: States of a fixed size after them; by default those before the first token.
        """
        return self._requests.prefix(pages, length, fixed)

    @announced
    def prefill(self, prefix: Prefix, bucket: PrefillBucket, settings: Settings) -> Prefix:
        """Reads the next prefill chunk of a prompt (see ``prompts.prefill``)."""
        tokens, lengths, bits = self._put((bucket.tokens, bucket.lengths, settings.bits))
        pages = self.shape.pages_read(bucket.tokens.shape[1], bucket.end)
        thresholds, drafter = None, self._state.drafter
        if (dial := self._dial) is not None:
            program = prompts.preview_thresholds
            thresholds = self._run(
                "thresholds", program, dial, bits, result=lambda: jax.eval_shape(program, dial, bits)
            )
        if drafter is not None:
            program = speculate.read_prompt
            arguments = self._drafter, drafter, prefix.pages, prefix.length, tokens, lengths
            drafter = self._run("read_prompt", program, *arguments, pages_read=pages, result=lambda: drafter)
        cache, prefix = self._run_model(
            "prefill",
            prompts.prefill,
            self._state.cache,
            prefix,
            tokens,
            lengths,
            thresholds,
            pages_read=pages,
            result=lambda: (self._state.cache, prefix),
        )
        self._state = dataclasses.replace(self._state, cache=cache, drafter=drafter)
        return prefix

    @announced
    def prompt_logprobs(
        self, prefix: Prefix, bucket: PrefillBucket, following: Int[np.ndarray, "1 t"]
    ) -> Any:
        """Returns the ``TokenLogprobs`` of an unread prefill chunk (see ``prompts.prompt_logprobs``)."""
        tokens, following = self._put((bucket.tokens, following))
        cache, logprobs = self._run_model(
            "prompt_logprobs",
            prompts.prompt_logprobs,
            self._state.cache,
            prefix,
            tokens,
            following,
            pages_read=self.shape.pages_read(bucket.tokens.shape[1], bucket.end),
            top_logprobs=self._top_logprobs,
            result=lambda: (self._state.cache, None),
        )
        self._state = dataclasses.replace(self._state, cache=cache)
        return logprobs

    @announced
    def insert(
        self,
        slot: int,
        prefix: Prefix,
        prompt: Sequence[int],
        settings: Settings,
        logprobs: bool,
        allowed: UInt32[np.ndarray, "words"] | None = None,
    ) -> Any:
        """Starts an answer in a slot; returns its first token, a ``Chunk`` (see ``answers.insert``)."""
        texts = self._state.slots.texts
        padded = None if texts is None else texts.tokens.shape[1]
        settings, in_prompt, mask, tokens = self._requests.of_answer(settings, prompt, allowed, padded)
        slots, first = self._run(
            "insert",
            answers.insert,
            self._state.slots,
            self._requests.slots[slot],
            prefix,
            settings,
            in_prompt,
            self._dial,
            mask,
            self._drafter,
            tokens,
            policy=self._policy,
            top_logprobs=self._count(logprobs),
            result=lambda: (self._state.slots, None),
        )
        self._state = dataclasses.replace(self._state, slots=slots)
        return first

    def level(self, bits: Iterable[float]) -> int | None:
        """Returns the level at which a chunk reads weights for rows that want these bits; None to grade."""
        if self.levels == [None]:
            return None
        return reading.batch_level(self.shape.slots, bits, self._num_planes)

    def masks(self, allowed: Mapping[int, UInt32[np.ndarray, "words"]]) -> UInt32[np.ndarray, "b words"]:
        """Returns the masks of all slots; those that ``allowed`` lacks may choose every token."""
        return host_arrays.masks(self.shape.slots, self._config.vocab_size, allowed)

    @announced
    def generate(
        self,
        rows: Sequence[int],
        greedy: bool,
        logprobs: bool,
        allowed: UInt32[np.ndarray, "b words"] | None = None,
        level: int | None = None,
    ) -> Any:
        """Decodes a ``Chunk`` for some slots (see ``answers.generate``). Its rows are those of ``rows``.

        Args:
          rows: Slots, as many as one of ``step_shapes`` has; all of them in order.
          greedy: Whether all answers are decoded greedily.
          logprobs: Whether the chunk has log-probabilities. It then decodes all slots.
          allowed: Tokens that each slot may choose (see ``masks``). The chunk then has one step, and
            log-probabilities.
          level: Level at which all weights are read, one of ``levels``.
        """
        self._state, chunk = self._run_model(
            "generate",
            answers.generate,
            self._state,
            self._dial,
            self._rows(rows),
            None if allowed is None else self._put(allowed),
            level=level,
            **self._chunk_options(StepShape(len(rows), 0), greedy, logprobs, allowed is not None),
            result=lambda: (self._state, None),
        )
        return chunk

    @announced
    def speculate(
        self,
        rows: Sequence[int],
        most_drafts: Sequence[int],
        drafts: int,
        greedy: bool,
        logprobs: bool,
        allowed: UInt32[np.ndarray, "b words"] | None = None,
    ) -> tuple[Any, Any]:
        """Decodes a chunk for some slots (see ``speculate.speculate``). Its rows are those of ``rows``.

        Returns a ``Chunk`` and its ``PackedCounts``.

        Args:
          most_drafts, drafts: Largest numbers of drafts of each slot and of all.
          rows, greedy, logprobs, allowed: As in ``generate``.
        """
        self._state, chunk, counts = self._run_model(
            "speculate",
            speculate.speculate,
            self._state,
            self._dial,
            self._drafter,
            self._rows(rows),
            *self._put((np.asarray(most_drafts, np.int32), allowed)),
            drafts=drafts,
            **self._chunk_options(StepShape(len(rows), drafts), greedy, logprobs, allowed is not None),
            result=lambda: (self._state, None, None),
        )
        return chunk, counts

    def steps(self, shape: StepShape) -> int:
        """Returns the number of steps of a chunk (see ``StepShape.steps``)."""
        return shape.steps(self._policy.chunk_steps)

    @announced
    def turn(self, slot: int, bits: float) -> None:
        """Changes the wanted mean bits of an answer."""
        self._change("turn", answers.turn, slot, self._put(np.float32(bits)))

    @announced
    def free(self, slot: int) -> None:
        """Ends the answer in a slot. A single slot then decodes nothing, so its state may stay."""
        if self.shape.slots > 1:
            self._change("free", answers.free, slot, num_pages=self.shape.num_pages)

    def _change(self, name: str, program: Any, slot: int, *arguments: Any, **static: Any) -> None:
        """Dispatches a program that changes the row of a slot (see ``_run``)."""
        before, row = self._state.slots, self._requests.slots[slot]
        after = self._run(name, program, before, row, *arguments, **static, result=lambda: before)
        self._state = dataclasses.replace(self._state, slots=after)

    def _run(self, name: str, program: Any, *arguments: Any, result: Callable[[], Any], **static: Any) -> Any:
        """Dispatches a program.

        Args:
          name: Name of the program, for devices that run nothing.
          program, arguments, static: Jitted function, and its arguments.
          result: Function that returns the shapes of the results, as far as other programs take them.
        """
        del name, result
        return program(*arguments, **static)

    def _run_model(self, name: str, program: Any, *arguments: Any, **options: Any) -> Any:
        """Dispatches a program whose first argument is the model (see ``_run``)."""
        return self._run(name, functools.partial(program, self._model), *arguments, **options)

    def _chunk_options(self, shape: StepShape, greedy: bool, logprobs: bool, masked: bool) -> dict[str, Any]:
        """Returns static arguments of a decode chunk. All chunks with masks run one program, of one step."""
        greedy, count = greedy and not masked, self._count(logprobs or masked)
        steps = 1 if masked else self.steps(shape)
        return {"policy": self._policy, "steps": steps, "greedy": greedy, "top_logprobs": count}

    def _rows(self, rows: Sequence[int]) -> Any:
        """Returns the slots of a chunk as an array; None for all."""
        if len(rows) == self.shape.slots:
            return None
        if self._last_rows[0] != tuple(rows):  # Most chunks have the slots of the one before.
            self._last_rows = tuple(rows), self._put(np.asarray(rows, np.int32))
        return self._last_rows[1]

    def _count(self, logprobs: bool) -> int | None:
        """Returns the number of most likely tokens whose log-probabilities a program computes."""
        return self._top_logprobs if logprobs else None

    def _put(self, arrays: Any) -> Any:
        return self._placement.put(arrays)
