"""The model and its state on the device: compiles and dispatches the programs of all slots."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt32

from grinqh_jax.decoding import reading
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.engine.chunk import Chunk
from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS
from grinqh_jax.decoding.logprobs import MOST_LOGPROBS, TokenLogprobs
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, bucket_widths
from grinqh_jax.decoding.programs import Lowering, Programs
from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.decoding.slots import answers, prompts
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.slots.speculate import read_prompt, speculate
from grinqh_jax.decoding.slots.state import DecodeState
from grinqh_jax.decoding.speculation import block_dial
from grinqh_jax.decoding.speculation.chunk import Counts
from grinqh_jax.decoding.speculation.draft_length import StepShape, step_shapes
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import rollback_lacks
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.fixed_states import FixedStates, fixed_states
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import shardings, zeros_on_mesh
from pallas_kernels.layout import DIGIT_BITS


class Device:
    """A model, and the state of all slots. Methods dispatch work and do not wait for it.

    Attributes:
      shape: Sizes of state and programs.
      graded: Whether the model is graded.
      speculation: How the device speculates; None if it does not.
      step_shapes: Shapes of steps with speculation; empty without.
    """

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
          abstract: Whether to allocate nothing; only ``lowerings`` may be called then.

        Raises:
          UsageError: There is speculation, and the cache of the model cannot be rolled back, or there are too
            many slots.
        """
        self.shape = shape
        self.graded = dial is not None
        self._config, self._policy, self._partition = model.config, policy, model.partition
        self._cache_config, self._dtype = model.cache_config, model.compute_dtype
        self._one_step = dataclasses.replace(policy, chunk_steps=1)
        self._top_logprobs = min(MOST_LOGPROBS, model.config.vocab_size)
        # The sharding of all arguments is the same from the first call on, because jit compiles again for
        # another one.
        self._sharding = model.norm.scale[...].sharding
        self._abstract = abstract
        self._num_planes = model.full_bits // DIGIT_BITS if self.graded else 0
        # Texts that share nothing are evaluated, each token at its own levels, whatever their number.
        graded_rows = shape.contiguous or not self.graded
        self._levels = [None] if graded_rows else reading.possible_levels(shape.slots, self._num_planes)
        self.speculation, self.step_shapes = speculation, list[StepShape]()
        drafter = None
        if speculation is not None:
            if shape.slots > MAX_GRADED_ROWS and not shape.contiguous:
                raise UsageError(
                    f"speculation reads at most {MAX_GRADED_ROWS} rows together, and there are {shape.slots} "
                    f"slots; use at most {MAX_GRADED_ROWS}, or decode without speculation"
                )
            if (lacking := rollback_lacks(model.config)) is not None:
                raise UsageError(
                    f"speculation needs a cache that can be rolled back, and this model has {lacking}; "
                    "decode without speculation"
                )
            drafter = speculation.drafter
            self.step_shapes = step_shapes(shape.slots, speculation.most_drafts, shape.contiguous)
            dial = None if dial is None else block_dial.in_blocks(dial)
        self._model, self._dial = FlatModel(model), jax.device_put(dial, self._sharding)
        self._drafter = jax.device_put(drafter, self._sharding)

        def state() -> DecodeState:
            sizes = shape.num_pages, shape.page_size, self._dtype, shape.ring_context
            pages = cache or zeros_on_mesh(
                lambda: PagedCache.create(self._cache_config, *sizes), model.partition
            )
            per_slot, fixed = None if shape.contiguous else shape.pages_per_slot, self._fixed(shape.slots)
            return DecodeState.create(
                pages, model.config, settings, shape.slots, per_slot, self.graded, fixed, drafter
            )

        self._state = self._put(jax.eval_shape(state) if abstract else state())

    @property
    def cache(self) -> PagedCache:
        """Pages of all texts, after the work dispatched so far. The next call of a method donates them."""
        return self._state.cache

    def compile(self, programs: Programs) -> None:
        """Compiles all programs, several at once, and runs them on no tokens. No slot may be in use."""
        settings = jax.tree.map(lambda rows: np.asarray(rows)[:1], self._state.slots.settings)
        widths = bucket_widths(max(self.shape.piece, PREVIEW_TOKENS))
        chunks = (False, False), (True, False), (False, True)
        programs.compile(self.lowerings(widths, settings, chunks, logprobs=(False, True)))
        for _ in range(2):  # The second time all inputs are outputs of the programs.
            for width in widths:
                prefix = self.prefix([], 0)
                bucket = PrefillBucket(np.zeros((1, width), np.int32), np.zeros(1, np.int32), 0)
                for _ in range(2):  # A prefix without tokens, and one that a prefill returned.
                    if self.shape.prompt_logprobs:
                        self.prompt_logprobs(prefix, bucket, bucket.tokens)
                    prefix = self.prefill(prefix, bucket, settings)
            for logprobs in (False, True):
                self.insert(0, prefix, [], settings, logprobs)
            if self.speculation is None:
                for level, (greedy, logprobs) in itertools.product(self._levels, chunks):
                    self.generate(greedy, logprobs, level)
            for shape, (greedy, logprobs) in itertools.product(self.step_shapes, chunks):
                rows = range(shape.texts)
                self.speculate(rows, [0] * shape.texts, shape.drafts, greedy, logprobs)
            if self.shape.grammars:
                allowed = self._all_allowed(self.shape.slots)
                if self.speculation is not None:
                    self.speculate_masked(allowed)
                else:
                    for level in self._levels:
                        self.generate_masked(allowed, level)
            if self.graded:
                self.turn(0, 0.0)
            self.free(0)
        jax.block_until_ready(self._state)

    def lowerings(
        self,
        widths: Iterable[int],
        settings: Settings,
        chunks: Iterable[tuple[bool, bool]],
        logprobs: Iterable[bool] = (False,),
    ) -> dict[Hashable, Lowering]:
        """Returns the lowerings of the programs that jobs run.

        Args:
          widths: Widths of the pieces of their prompts.
          settings: Settings of one of them.
          chunks: Arguments of ``generate``.
          logprobs: Arguments of ``insert``.
        """
        wanted: dict[Hashable, Lowering] = {}

        def add(name: str, lower: Callable[..., jax.stages.Lowered], *arguments: Any, **static: Any) -> None:
            arguments = self._structs(arguments)
            leaves, structure = jax.tree.flatten(arguments)
            sizes = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
            wanted[name, structure, sizes, *static.items()] = functools.partial(lower, *arguments, **static)

        def of_model(function: Any) -> Callable[..., jax.stages.Lowered]:
            return functools.partial(function.lower, self._model)

        state, dial, one, slot = self._state, self._dial, np.zeros(1, np.int32), np.int32(0)
        fixed, policy = jax.eval_shape(lambda: self._fixed(1)), self._policy
        prefix = Prefix.create(self._config, self._row([]), 0, self.graded, fixed)
        thresholds = None
        if dial is not None:
            add("thresholds", prompts.preview_thresholds.lower, dial, settings.bits)
            thresholds = jax.eval_shape(prompts.preview_thresholds, dial, settings.bits)
        for width in widths:
            tokens = np.zeros((1, width), np.int32)
            prefill = of_model(prompts.prefill)
            add("prefill", prefill, state.cache, prefix, tokens, one, thresholds)
            if state.drafter is not None:
                read = self._drafter, state.drafter, prefix.pages, prefix.length, tokens, one
                add("read_prompt", read_prompt.lower, *read)
            if self.shape.prompt_logprobs:
                lower, count = of_model(prompts.prompt_logprobs), self._top_logprobs
                add("prompt_logprobs", lower, state.cache, prefix, tokens, tokens, top_logprobs=count)
        for wants in logprobs:
            arguments: Any = state, slot, prefix, settings, self._in_prompt([]), dial, self._any_first()
            arguments += self._drafting([])
            insert = answers.insert.lower
            add("insert", insert, *arguments, policy=policy, top_logprobs=self._count(wants))
        levels = self._levels if self.speculation is None else []
        for level, (greedy, wants) in itertools.product(levels, chunks):
            static = {"policy": policy, "greedy": greedy, "level": level}
            static["top_logprobs"] = self._count(wants)
            add("generate", of_model(answers.generate), state, dial, **static)
        for shape, (greedy, wants) in itertools.product(self.step_shapes, chunks):
            rows = np.zeros(shape.texts, np.int32)
            static = {"policy": policy, "greedy": greedy, "top_logprobs": self._count(wants)}
            static |= {"steps": self.steps(shape.drafts), "drafts": shape.drafts}
            add("speculate", of_model(speculate), state, dial, self._drafter, rows, rows, None, **static)
        if self.shape.grammars:
            allowed, rows = self._all_allowed(self.shape.slots), np.zeros(self.shape.slots, np.int32)
            static = {"policy": self._one_step, "greedy": False, "top_logprobs": self._top_logprobs}
            for level in levels:
                add(
                    "generate",
                    of_model(answers.generate),
                    state,
                    dial,
                    allowed,
                    level=level,
                    **static,
                )
            if self.speculation is not None:
                arguments = state, dial, self._drafter, rows, rows, allowed
                add("speculate", of_model(speculate), *arguments, steps=1, drafts=0, **static)
        if self.shape.slots > 1:
            add("free", answers.free.lower, state, slot)
        if self.graded and not self.shape.contiguous:
            add("turn", answers.turn.lower, state, slot, np.float32(0))
        return wanted

    def prefix(self, pages: Sequence[int], length: int, fixed: FixedStates | None = None) -> Prefix:
        """Returns the prefix of a text whose first ``length`` tokens are in its pages already.

        Args:
          pages: Pages of the text.
          length: Number of tokens that are reused.
          fixed: States of a fixed size after them; by default those before the first token.
        """
        prefix = Prefix.create(self._config, self._row(pages), length, self.graded, fixed or self._fixed(1))
        return self._put(prefix)

    def prefill(self, prefix: Prefix, piece: PrefillBucket, settings: Settings) -> Prefix:
        """Reads the next piece of a prompt (see ``prompts.prefill``)."""
        tokens, lengths, bits = self._put((piece.tokens, piece.lengths, settings.bits))
        thresholds = None if self._dial is None else prompts.preview_thresholds(self._dial, bits)
        drafter = self._state.drafter
        if drafter is not None:
            arguments = prefix.pages, prefix.length, tokens, lengths
            drafter = read_prompt(self._drafter, drafter, *arguments)
        cache, prefix = prompts.prefill(self._model, self._state.cache, prefix, tokens, lengths, thresholds)
        self._state = dataclasses.replace(self._state, cache=cache, drafter=drafter)
        return prefix

    def prompt_logprobs(
        self, prefix: Prefix, piece: PrefillBucket, following: Int[np.ndarray, "1 t"]
    ) -> TokenLogprobs:
        """Returns log-probabilities of a piece, before it is read (see ``prompts.prompt_logprobs``)."""
        tokens, following = self._put((piece.tokens, following))
        cache, logprobs = prompts.prompt_logprobs(
            self._model, self._state.cache, prefix, tokens, following, top_logprobs=self._top_logprobs
        )
        self._state = dataclasses.replace(self._state, cache=cache)
        return logprobs

    def insert(
        self,
        slot: int,
        prefix: Prefix,
        prompt: Sequence[int],
        settings: Settings,
        logprobs: bool,
        allowed: UInt32[np.ndarray, "words"] | None = None,
    ) -> Chunk:
        """Starts the answer to a prompt in a slot; returns its first token (see ``answers.insert``)."""
        mask = self._any_first() if allowed is None else allowed[None]
        row, settings, in_prompt, mask, drafting = self._put(
            (np.int32(slot), settings, self._in_prompt(prompt), mask, self._drafting(prompt))
        )
        self._state, first = answers.insert(
            self._state,
            row,
            prefix,
            settings,
            in_prompt,
            self._dial,
            mask,
            *drafting,
            policy=self._policy,
            top_logprobs=self._count(logprobs),
        )
        return first

    def level(self, bits: Iterable[float]) -> int | None:
        """Returns the level at which a chunk reads weights for rows that want these bits; None to grade."""
        if self._levels == [None]:
            return None
        return reading.batch_level(self.shape.slots, bits, self._num_planes)

    def generate(self, greedy: bool, logprobs: bool, level: int | None = None) -> Chunk:
        """Decodes a chunk for all slots (see ``answers.generate``)."""
        self._state, chunk = answers.generate(
            self._model,
            self._state,
            self._dial,
            policy=self._policy,
            greedy=greedy,
            top_logprobs=self._count(logprobs),
            level=level,
        )
        return chunk

    def generate_masked(self, allowed: UInt32[np.ndarray, "b words"], level: int | None = None) -> Chunk:
        """Decodes one token for all slots, of those that each may choose, with its log-probabilities.

        Args:
          allowed: Tokens that each slot may choose (see ``sampling.Sampling``).
          level: As in ``generate``.
        """
        self._state, chunk = answers.generate(
            self._model,
            self._state,
            self._dial,
            self._put(allowed),
            policy=self._one_step,
            greedy=False,
            level=level,
            top_logprobs=self._top_logprobs,
        )
        return chunk

    def masks(self, allowed: Mapping[int, UInt32[np.ndarray, "words"]]) -> UInt32[np.ndarray, "b words"]:
        """Returns the masks of all slots; those that ``allowed`` lacks may choose every token."""
        masks = self._all_allowed(self.shape.slots)
        for slot, mask in allowed.items():
            masks[slot] = mask
        return masks

    def speculate(
        self, rows: Sequence[int], most_drafts: Sequence[int], drafts: int, greedy: bool, logprobs: bool
    ) -> tuple[Chunk, Counts]:
        """Decodes a chunk for some slots (see ``decode.speculate``). Its rows are those of ``rows``."""
        slots, most = self._put((np.asarray(rows, np.int32), np.asarray(most_drafts, np.int32)))
        self._state, chunk, counts = speculate(
            self._model,
            self._state,
            self._dial,
            self._drafter,
            slots,
            most,
            None,
            policy=self._policy,
            greedy=greedy,
            top_logprobs=self._count(logprobs),
            steps=self.steps(drafts),
            drafts=drafts,
        )
        return chunk, counts

    def speculate_masked(self, allowed: UInt32[np.ndarray, "b words"]) -> tuple[Chunk, Counts]:
        """Decodes one token for all slots without drafts, as ``generate_masked`` does."""
        slots = self.shape.slots
        rows, most, mask = self._put((np.arange(slots, dtype=np.int32), np.zeros(slots, np.int32), allowed))
        self._state, chunk, counts = speculate(
            self._model,
            self._state,
            self._dial,
            self._drafter,
            rows,
            most,
            mask,
            policy=self._one_step,
            greedy=False,
            top_logprobs=self._top_logprobs,
            steps=1,
            drafts=0,
        )
        return chunk, counts

    def steps(self, drafts: int) -> int:
        """Returns the number of steps of a chunk. One with drafts has half as many, with more tokens each."""
        return -(-self._policy.chunk_steps // 2) if drafts else self._policy.chunk_steps

    def turn(self, slot: int, bits: float) -> None:
        """Changes the wanted mean bits of an answer."""
        self._state = answers.turn(self._state, *self._put((np.int32(slot), np.float32(bits))))

    def free(self, slot: int) -> None:
        """Ends the answer in a slot. A single slot then decodes nothing, so its state may stay."""
        if self.shape.slots > 1:
            self._state = answers.free(self._state, self._put(np.int32(slot)))

    def _fixed(self, batch: int) -> FixedStates:
        """Returns the states of a fixed size of empty texts."""
        sizes = batch, self._dtype, self.shape.ring_context
        return zeros_on_mesh(lambda: fixed_states(self._cache_config, *sizes), self._partition)

    def _count(self, logprobs: bool) -> int | None:
        """Returns the number of most likely tokens whose log-probabilities a program computes."""
        return self._top_logprobs if logprobs else None

    def _all_allowed(self, rows: int) -> UInt32[np.ndarray, "rows words"]:
        return np.full((rows, -(-self._config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)

    def _any_first(self) -> UInt32[np.ndarray, "1 words"] | None:
        """Returns the mask of a first token that may be any; None if no request has a grammar."""
        return self._all_allowed(1) if self.shape.grammars else None

    def _row(self, pages: Sequence[int]) -> Int[np.ndarray, "pages_per_slot"]:
        row = np.full(self.shape.pages_per_slot, self.shape.num_pages, np.int32)
        row[: len(pages)] = pages
        return row

    def _in_prompt(self, prompt: Sequence[int]) -> Any:
        """Returns which tokens a prompt has, if the settings have penalties."""
        if self._state.slots.history is None:
            return None
        in_prompt = np.zeros((1, self._config.vocab_size), bool)
        in_prompt[0, np.asarray(prompt, np.int32)] = True
        return in_prompt

    def _drafting(self, prompt: Sequence[int]) -> tuple[Any, Any]:
        """Returns the drafter and the tokens of a prompt, padded to the size of a slot, for ``insert``."""
        texts = self._state.slots.texts
        if texts is None:
            return None, None
        tokens = np.zeros((1, texts.tokens.shape[1]), np.int32)
        tokens[0, : len(prompt)] = prompt
        return self._drafter, tokens

    def _put(self, arrays: Any) -> Any:
        """Puts arrays on the device, or on those of the mesh, with the sharding of the loop."""
        if self._abstract:
            return self._structs(arrays)
        return jax.device_put(arrays, self._shardings(arrays))

    def _structs(self, arrays: Any) -> Any:
        """Returns shapes and dtypes with the shardings that ``_put`` gives to the arrays."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            arrays,
            self._shardings(arrays),
        )

    def _shardings(self, arrays: Any) -> Any:
        if self._partition is not None:
            return shardings(arrays, self._partition)
        return jax.tree.map(lambda leaf: self._sharding, arrays)
