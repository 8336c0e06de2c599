"""Text generation as a library: a model, its tokenizer, and the dial.

generator = Generator.load("path/to/checkpoint")
generation = generator.generate("Once upon a time", Request(bits=3.0))
for text in generation:
    print(text, end="", flush=True)
print(generation.statistics().realised_bits_per_layer)
"""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax import checkpoint, hf
from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.bits import Bits, wanted_bits
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.generation import Generation
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.model_files import ModelFiles, check_context, prompt_too_long
from grinqh_jax.decoding.penalties import NEUTRAL
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.prefill_buckets import CONVERSATION_WIDTHS, first_previewed
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.prompt_cache import PromptCache, conversation_capacity
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.shape import contiguous_shape
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.texts import Texts
from grinqh_jax.errors import GrinqhWarning, UsageError
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.partition import ExchangeSetting
from grinqh_jax.text.tokenizer import Tokenizer
from pallas_kernels.layout import round_up
from pallas_kernels.x64 import without_x64

CAPACITY_STEP = 256
"""Cache capacities are multiples of this, or the whole context, so that few programs are compiled."""


class Generator:
    """A model that is ready to generate.

    Attributes:
      model: The weights.
      tokenizer: The model's tokenizer.
      defaults: The model's special tokens and sampling defaults.
      targets: Ascending mean bits of the threshold tables; None for an unquantized model.
      directory: Directory of the checkpoint.
      programs: Programs of the model that are compiled.
      holds_dial: Whether the dial keeps the setting that it has at the end of the prompt. With such a dial, a
        text with speculation is the text without, token for token, at the price of less exact mean bits.
    """

    holds_dial = False

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
        self.programs = Programs()

    @classmethod
    @without_x64
    def load(
        cls,
        model: str | os.PathLike[str],
        compute_dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        exchange: ExchangeSetting = "auto",
    ) -> "Generator":
        """Loads a GRINQH checkpoint, or an unquantized Hugging Face one (at full precision only).

        Args:
          model: A directory or a hub id.
          compute_dtype: Dtype of hidden states and matrix products, by default float32 on a CPU and bfloat16
            elsewhere.
          mesh: Mesh to cut the model among (``sharding.mesh``); None for one device.
          exchange: How a decode step adds up the results of the devices (``partition.ExchangeSetting``).

        Raises:
          UsageError: The mesh does not fit the model.
          CheckpointError: There is no such checkpoint, or it is damaged.
          UnsupportedModelError: The architecture or one of its options is not implemented.
        """
        return cls.from_files(ModelFiles.open(model), compute_dtype, mesh, exchange)

    @classmethod
    @without_x64
    def from_files(
        cls,
        files: ModelFiles,
        compute_dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        exchange: ExchangeSetting = "auto",
    ) -> "Generator":
        """Loads the weights of a model whose other files have been read.

        Args:
          files: The files of the model without its weights.
          compute_dtype, mesh, exchange: As for ``load``.

        Raises:
          GrinqhError: As for ``load``.
        """
        if files.quantization is None:
            if compute_dtype is None:
                compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            decoder = hf.load_decoder(hf.open_checkpoint(files.directory), compute_dtype, mesh, exchange)
        else:
            decoder = checkpoint.load(files.directory, compute_dtype, mesh=mesh, exchange=exchange).model
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
        speculation: Speculation | None = None,
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
          speculation: How to speculate, by default not at all. With a draft model, which reads prompts, too,
            the prompt cache is not used.

        Raises:
          UsageError: The bits are outside the dial's range, the prompt is too long for the context, the
            prompt is empty and the model has no BOS or EOS token, a token is outside the vocabulary, the
            context is larger than the model's, or the prompt cache belongs to another model.
        """
        request = request or Request()
        tokens, context = self.prompt_tokens(prompt), check_context(max_context, self.model.config)
        if len(tokens) >= context:
            raise prompt_too_long(len(tokens), context)
        limit = min(request.max_tokens, context - len(tokens))
        settings, dial = self.settings(request, limit), self.dial(request.bits)
        cache, needed = prompt_cache or PromptCache(), len(tokens) + limit
        capacity = conversation_capacity(needed) if cache.few_sizes else round_up(needed, CAPACITY_STEP)
        capacity = min(capacity, context)
        read_from = len(tokens) - 1 if dial is None else first_previewed(len(tokens))
        if speculation is not None and speculation.reads_prompts:
            read_from = 0
        pages = cache.acquire(self.model, tokens, capacity, read_from)
        if pages is not None:
            capacity = pages.page_size
        texts = Texts(
            self.model,
            dial,
            settings,
            capacity=capacity,
            storage=cache,
            cache=pages,
            rings=prompt_cache is None,
            speculation=speculation,
        )
        cache.give(texts.device)
        text = AnswerText(self.tokenizer.stream(), request.stop, self.stop_tokens(request))
        bits = self.bits(request.bits)
        return Generation(self.model, self.programs, texts, cache, tokens, settings, text, bits)

    @without_x64
    def compile_conversation(
        self,
        request: Request | None = None,
        *,
        context: int = 1,
        max_context: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """Compiles the programs of a conversation, so that its turns do not wait. May run in any thread.

        Args:
          request: Settings of the turns.
          context: Number of tokens of the conversation, including the next answer. It determines the size of
            the cache, and each size needs other programs.
          max_context, speculation: As for ``generate``.
        """
        request = request or Request()
        capacity = min(conversation_capacity(context), check_context(max_context, self.model.config))
        settings = self.settings(request, 1)
        device = Device(
            self.model,
            self.dial(request.bits),
            contiguous_shape(capacity),
            DecodePolicy.for_device(),
            settings,
            speculation=speculation,
            abstract=True,
        )
        small, large = CONVERSATION_WIDTHS
        self.programs.compile(lowerings(device, [small], settings, [(settings.greedy, False)]))
        if capacity > small:
            self.programs.compile(lowerings(device, [large], settings, []))

    def settings(self, request: Request, limit: int) -> Settings:
        """Returns the settings of a request that decodes at most ``limit`` tokens.

        They select the programs without penalties or biases, if the request has none.

        Raises:
          UsageError: See ``generate``.
        """
        sampling = Sampling.on_host(1, seed=request.seed, **self.sampling(request))
        return Settings.of_request(sampling, self.bits(request.bits), self.stop_tokens(request), limit)

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
        dial = Dial.create(self.model, self.targets, np.full(batch, wanted))
        return dataclasses.replace(dial, held=self.holds_dial)

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
