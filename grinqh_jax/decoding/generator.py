"""Text generation as a library: a model, its tokenizer, and the dial.

generator = Generator.load("path/to/checkpoint")
generation = generator.generate("Once upon a time", Request(bits=3.0))
for text in generation:
    print(text, end="", flush=True)
print(generation.statistics().realised_bits_per_layer)
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax import checkpoint, hf
from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.batch import Decoding, stop_array
from grinqh_jax.decoding.bits import Bits, wanted_bits
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.model_files import ModelFiles, check_context
from grinqh_jax.decoding.penalties import NEUTRAL
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import CONVERSATION_WIDTHS
from grinqh_jax.decoding.programs import Programs, Signature
from grinqh_jax.decoding.prompt_cache import PromptCache, conversation_capacity
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.statistics import Statistics, grading_fields, joined
from grinqh_jax.errors import GrinqhWarning, UsageError
from grinqh_jax.memory import peak_memory
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.text.tokenizer import Tokenizer
from pallas_kernels import GradingStats
from pallas_kernels.x64 import without_x64


class Generator:
    """A model that is ready to generate.

    Attributes:
      model: The weights.
      tokenizer: The model's tokenizer.
      defaults: The model's special tokens and sampling defaults.
      targets: Ascending mean bits of the threshold tables; None for an unquantized model.
      directory: Directory of the checkpoint.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        defaults: GenerationConfig,
        targets: Sequence[float] | None,
        directory: Path,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.targets = targets
        self.directory = directory
        self._programs = Programs()

    @classmethod
    @without_x64
    def load(cls, model: str | os.PathLike[str], compute_dtype=None) -> "Generator":
        """Loads a GRINQH checkpoint, or an unquantized Hugging Face one (at full precision only).

        Args:
          model: A directory or a hub id.
          compute_dtype: Dtype of hidden states and matrix products, by default float32 on a CPU and bfloat16
            elsewhere.

        Raises:
          CheckpointError: There is no such checkpoint, or it is damaged.
          UnsupportedModelError: The architecture or one of its options is not implemented.
        """
        return cls.from_files(ModelFiles.open(model), compute_dtype)

    @classmethod
    @without_x64
    def from_files(cls, files: ModelFiles, compute_dtype=None) -> "Generator":
        """Loads the weights of a model whose other files have been read.

        Args:
          files: The files of the model without its weights.
          compute_dtype: As for ``load``.

        Raises:
          GrinqhError: As for ``load``.
        """
        if files.quantization is None:
            if compute_dtype is None:
                compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            decoder = hf.load_decoder(hf.open_checkpoint(files.directory), compute_dtype)
        else:
            decoder = checkpoint.load(files.directory, compute_dtype).model
        if files.defaults.ignored:
            warnings.warn(
                f"{files.directory}: not implemented and ignored in generation_config.json: "
                f"{', '.join(files.defaults.ignored)}",
                GrinqhWarning,
                stacklevel=2,
            )
        return cls(decoder, files.tokenizer, files.defaults, files.targets, files.directory)

    @without_x64
    def generate(
        self,
        prompt: str | Sequence[int],
        request: Request | None = None,
        *,
        max_context: int | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> "Generation":
        """Prepares a text; iterate over the result to generate it.

        Args:
          prompt: Plain text, or tokens (of ``tokenizer.chat``, for instance). An empty prompt is replaced by
            the model's BOS token, or its EOS token if it has no BOS token.
          request: Settings of the generation.
          max_context: Largest number of tokens of prompt and text together, by default the number of
            positions that the model has.
          prompt_cache: Cache of a conversation, so that each turn reads only what is new. The text is the
            same with and without it.

        Raises:
          UsageError: The bits are outside the dial's range, the prompt is too long for the context, the
            prompt is empty and the model has no BOS or EOS token, a token is outside the vocabulary, the
            context is larger than the model's, or the prompt cache belongs to another model.
        """
        request = request or Request()
        tokens = self.prompt_tokens(prompt)
        decoding = Decoding(
            self.model,
            [tokens],
            max_tokens=request.max_tokens,
            max_context=check_context(max_context, self.model.config),
            dial=self.dial(request.bits),
            sampling=Sampling.create(seed=request.seed, **self.sampling(request)),
            stop_tokens=self.stop_tokens(request),
            programs=self._programs,
            prompt_cache=prompt_cache,
        )
        return Generation(self, decoding, request, prompt_tokens=len(tokens), prompt_cache=prompt_cache)

    @without_x64
    def compile_conversation(
        self, request: Request | None = None, *, context: int = 1, max_context: int | None = None
    ) -> None:
        """Compiles the programs of a conversation, so that its turns do not wait. May run in any thread.

        Args:
          request: Settings of the turns.
          context: Number of tokens of the conversation, including the next answer. It determines the size of
            the cache, and each size needs other programs.
          max_context: As for ``generate``.
        """
        request = request or Request()
        capacity = min(conversation_capacity(context), check_context(max_context, self.model.config))
        dial, sharding = self.dial(request.bits), self.model.norm.scale[...].sharding
        signature = Signature(
            self.model,
            FlatModel(self.model),
            batch=1,
            dial=jax.device_put(dial, sharding),
            sampling=Sampling.create(seed=request.seed, **self.sampling(request)),
            stop_tokens=stop_array(self.stop_tokens(request)),
            policy=DecodePolicy.for_device(),
        )
        small, large = CONVERSATION_WIDTHS
        self._programs.compile(signature.prefill([small], capacity) | signature.decode(capacity))
        if capacity > small:
            self._programs.compile(signature.prefill([large], capacity))

    def bits(self, wanted: Bits | None) -> float | None:
        """Returns the mean bits that a setting asks for; None for an unquantized model.

        Raises:
          UsageError: The setting is outside the dial's range.
        """
        return wanted_bits([wanted], self.targets, self.directory)[0]

    @without_x64
    def dial(self, bits: Bits | None, batch: int = 1) -> Dial | None:
        """Returns a dial with the same setting for every row of a batch; None for an unquantized model.

        Raises:
          UsageError: ``bits`` is outside the dial's range.
        """
        wanted = self.bits(bits)
        if self.targets is None or wanted is None:
            return None
        return Dial.create(self.model, self.targets, np.full(batch, wanted))

    def prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Returns the tokens of a prompt (see ``generate``).

        Raises:
          UsageError: A token is outside the vocabulary, or the prompt is empty and the model has no BOS or
            EOS token.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        tokens = tokens or [self._first_token()]
        self.model.config.check_tokens(tokens)
        return tokens

    def sampling(self, request: Request) -> dict[str, Any]:
        """Returns arguments of ``Sampling.create`` for a request by name, with the model's defaults.

        Raises:
          UsageError: A token with a bias is outside the vocabulary.
        """
        names = ("temperature", "top_k", "top_p", "min_p", *NEUTRAL)
        wanted = {name: getattr(request, name) for name in names}
        named = {k: getattr(self.defaults, k) if v is None else v for k, v in wanted.items()}
        bias = None
        if request.logit_bias:
            self.model.config.check_tokens(request.logit_bias)
            bias = np.zeros(self.model.config.vocab_size, np.float32)
            bias[list(request.logit_bias)] = list(request.logit_bias.values())
        return named | {"logit_bias": bias}

    def stop_tokens(self, request: Request) -> tuple[int, ...]:
        """Returns the tokens that end the text of a request.

        Raises:
          UsageError: A token is outside the vocabulary.
        """
        if request.stop_tokens is None:
            return self.defaults.eos_tokens
        self.model.config.check_tokens(request.stop_tokens)
        return tuple(request.stop_tokens)

    def _first_token(self) -> int:
        if self.defaults.bos_token is not None:
            return self.defaults.bos_token
        if self.defaults.eos_tokens:
            return self.defaults.eos_tokens[0]
        raise UsageError("the prompt is empty and the model has no BOS or EOS token; give a prompt")


class Generation:
    """One text that is generated: iterate over its pieces once, then read its figures.

    Attributes:
      text: Text generated so far.
      tokens: Tokens generated so far, a stop token included.
      bits: Mean bits asked for; None for an unquantized model.
      finish_reason: ``"stop"`` (stop token or stop string), ``"length"``, or None while unfinished.
    """

    def __init__(
        self,
        generator: Generator,
        decoding: Decoding,
        request: Request,
        prompt_tokens: int,
        prompt_cache: PromptCache | None = None,
    ):
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.bits = generator.bits(request.bits)
        self._model = generator.model
        self._decoding = decoding
        self._text = AnswerText(generator.tokenizer.stream(), request.stop, generator.stop_tokens(request))
        self._started = False
        self._stats: list[GradingStats] = []
        self._prompt_tokens = prompt_tokens
        self._prompt_cache = prompt_cache
        self._compile_seconds = self._prompt_seconds = self._generation_seconds = 0.0

    @without_x64
    def prepare(self) -> None:
        """Compiles the programs of the text, which takes seconds for new shapes.

        Iteration does this if the caller has not.
        """
        with self._invalidating_cache():
            self._compile()

    @without_x64
    def __iter__(self) -> Iterator[str]:
        """Yields the text in pieces of whole characters, as soon as later tokens cannot change them.

        Raises:
          UsageError: The generation has been iterated over before, or a later one uses its prompt cache.
        """
        if self._started:
            raise UsageError(
                "a generation is iterated over once: read its text, keep its iterator to go on later, "
                "or call generate again"
            )
        self._started = True
        with self._invalidating_cache():
            for piece in self._pieces():
                self.text += piece
                yield piece

    @property
    def grading_stats(self) -> GradingStats | None:
        """Statistics of every decode step so far, numpy ``[steps, linears]``; None for an unquantized model.

        Layers are in the order of ``decoder.linear_names``.
        """
        return joined(self._stats)

    @without_x64
    def statistics(self) -> Statistics:
        """Returns the figures so far, also of an unfinished generation."""
        return Statistics(
            prompt_tokens=self._prompt_tokens,
            reused_prompt_tokens=self._decoding.reused_tokens,
            generated_tokens=len(self.tokens),
            prompt_seconds=self._prompt_seconds,
            generation_seconds=self._generation_seconds,
            compile_seconds=self._compile_seconds,
            peak_memory_bytes=peak_memory(),
            **grading_fields(self._model, self.grading_stats),
        )

    def _pieces(self) -> Iterator[str]:
        for tokens in self._new_tokens():
            self.tokens += tokens
            piece, _ = self._text.push(tokens)
            if piece:
                yield piece
            if self._text.stopped:
                break
        rest = self._text.flush()
        if rest:
            yield rest
        self.finish_reason = "stop" if self._text.stopped else "length"

    def _new_tokens(self) -> Iterator[list[int]]:
        """Yields the tokens of each chunk. Only the model's time is measured, not the consumer's."""
        self._compile()
        first = self._decoding.prefill()
        self._prompt_seconds = first.seconds
        yield first.tokens[0]
        for chunk in self._decoding.chunks():
            self._generation_seconds += chunk.seconds
            if chunk.grading_stats is not None:
                self._stats.append(jax.tree.map(lambda steps: steps[:, 0], chunk.grading_stats))
            yield chunk.tokens[0]

    def _compile(self) -> None:
        started = time.perf_counter()
        self._decoding.compile()
        self._compile_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def _invalidating_cache(self) -> Iterator[None]:
        """Invalidates the prompt cache on an error. An interrupt leaves it usable."""
        try:
            yield
        except Exception:
            if self._prompt_cache is not None:
                self._prompt_cache.invalidate(self._decoding)
            raise
