"""Text generation as a library: a model, its tokenizer, and the dial.

generator = Generator.load("path/to/checkpoint")
generation = generator.generate("Once upon a time", Request(bits=3.0))
for text in generation:
    print(text, end="", flush=True)
print(generation.statistics().realised_bits_per_layer)
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax import checkpoint, hf
from grinqh_jax.decoding.batch import Decoding
from grinqh_jax.decoding.dial import Dial, check_bits
from grinqh_jax.decoding.engine import Grades
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.statistics import Statistics, grade_statistics
from grinqh_jax.decoding.stop import StopStrings
from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import read_json
from grinqh_jax.memory import peak_memory
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.text.tokenizer import Tokenizer

FULL = "full"
"""The dial's setting that reads everything that is stored."""

Bits = float | Literal["full"]

DEFAULT_BITS = 4.0
"""Mean bits where a request names none: close to full precision at a third of the bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. ``None`` takes the model's default (``GenerationConfig``, ``DEFAULT_BITS``).

    Attributes:
      bits: mean bits to read per weight, or ``"full"``, the only one for an unquantized model.
      max_tokens: most tokens to generate; the context may end the text earlier.
      temperature, top_k, top_p, min_p, seed: see ``sampling.Sampling``.
      stop: texts that end the generation and are not part of it; a string is one of them.
    """

    bits: Bits | None = None
    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: str | Sequence[str] = ()

    def __post_init__(self):
        if isinstance(self.stop, str):  # each of its characters would be taken for one
            object.__setattr__(self, "stop", (self.stop,))
        ranges = {
            "max_tokens": (1, 2**31 - 1),
            "temperature": (0, 1e6),
            "top_k": (0, 2**31 - 1),
            "top_p": (1e-6, 1),
            "min_p": (0, 1),
        }
        problems = []
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                problems.append(f"{name} is {value:g}, expected {least:g} to {most:g}")
        if any(not text for text in self.stop):
            problems.append("a stop string is empty")
        if problems:
            raise UsageError("; ".join(problems))


class Generator:
    """A model that is ready to generate.

    Attributes:
      model: its weights.
      tokenizer: its tokenizer.
      defaults: its special tokens and sampling defaults.
      targets: ascending mean bits of its threshold tables; None for an unquantized model.
      directory: where it came from.
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
        self._compiled: set[tuple] = set()

    @classmethod
    def load(cls, model: str | os.PathLike[str], compute_dtype=None) -> "Generator":
        """Loads a GRINQH checkpoint, or an unquantized Hugging Face one (at full precision only).

        Args:
          model: a directory or a hub id.
          compute_dtype: of hidden states and matrix products; by default float32 on a CPU and
            bfloat16 elsewhere.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
          UnsupportedModelError: its architecture or options are not implemented.
        """
        directory = hf.resolve(model)
        config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
        quantized = isinstance(config, dict) and config.get("quantization_config") is not None
        if not quantized and list(directory.glob("*.safetensors")):
            if compute_dtype is None:
                compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            decoder, targets = hf.load_decoder(hf.open_checkpoint(directory), compute_dtype), None
        else:
            loaded = checkpoint.load(directory, compute_dtype)
            decoder, targets = loaded.model, loaded.quantization.targets
        tokenizer, defaults = Tokenizer.load(directory), GenerationConfig.load(directory)
        return cls(decoder, tokenizer, defaults, targets, directory)

    def generate(
        self, prompt: str | Sequence[int], request: Request | None = None, *, max_context: int | None = None
    ) -> "Generation":
        """Prepares a text; iterate over the result to generate it.

        Args:
          prompt: a plain text, or tokens (of ``tokenizer.chat``, for instance). An empty one begins
            with the model's BOS token, or for want of one its EOS token.
          request: what to generate.
          max_context: most tokens of prompt and text together; by default all that the model has
            positions for.

        Raises:
          UsageError: bits out of the dial's range, a prompt too long for the context, an empty prompt
            for a model without BOS and EOS tokens, a token outside the vocabulary, a context larger than
            the model's.
        """
        request = request or Request()
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        tokens = tokens or [self._first_token()]
        self.model.config.check_tokens(tokens)
        defaults = self.defaults
        sampling = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampling = {k: getattr(defaults, k) if v is None else v for k, v in sampling.items()}
        decoding = Decoding(
            self.model,
            [tokens],
            max_tokens=request.max_tokens,
            max_context=self._context(max_context),
            dial=self.dial(request.bits),
            sampling=Sampling.create(seed=request.seed, **sampling),
            stop_tokens=defaults.eos_tokens,
            compiled=self._compiled,
        )
        return Generation(self, decoding, request, prompt_tokens=len(tokens))

    def bits(self, wanted: Bits | None) -> float | None:
        """What the dial stands at for a request's bits; None for an unquantized model.

        Raises:
          UsageError: they are out of the dial's range.
        """
        if self.targets is None:
            if wanted not in (None, FULL):
                raise UsageError(
                    f"bits {wanted}: {self.directory} is not quantized and runs at full precision only; use "
                    "full, or convert it first (python -m checkpoints_tools.convert)"
                )
            return None
        most = self.targets[-1]
        bits = min(DEFAULT_BITS, most) if wanted is None else most if wanted == FULL else wanted
        check_bits(bits, self.targets)
        return float(bits)

    def dial(self, bits: Bits | None, batch: int = 1) -> Dial | None:
        """A dial for every row of a batch; None for an unquantized model.

        Raises:
          UsageError: ``bits`` are out of the dial's range.
        """
        if (setting := self.bits(bits)) is None:
            return None
        return Dial(self.model, self.targets, np.full(batch, setting))

    def _context(self, max_context: int | None) -> int:
        most = self.model.config.max_position_embeddings
        if max_context is not None and not 2 <= max_context <= most:
            raise UsageError(f"a context of {max_context} tokens: the model has positions for 2 to {most}")
        return max_context or most

    def _first_token(self) -> int:
        if self.defaults.bos_token is not None:
            return self.defaults.bos_token
        if self.defaults.eos_tokens:
            return self.defaults.eos_tokens[0]
        raise UsageError("the prompt is empty and the model names no BOS or EOS token to begin with")


class Generation:
    """One text in the making: iterate over its pieces, once, then read its figures.

    Attributes:
      text: generated so far.
      tokens: generated so far, a stop token included.
      bits: what the dial stands at, None for an unquantized model.
      finish_reason: ``"stop"`` (stop token or stop string), ``"length"``, or None while unfinished.
    """

    def __init__(self, generator: Generator, decoding: Decoding, request: Request, prompt_tokens: int):
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.bits = generator.bits(request.bits)
        self._model = generator.model
        self._stop_tokens = generator.defaults.eos_tokens
        self._decoding = decoding
        self._stream = generator.tokenizer.stream()
        self._stop = StopStrings(request.stop)
        self._begun = False
        self._grades: list[Grades] = []
        self._prompt_tokens = prompt_tokens
        self._compile_seconds = self._prompt_seconds = self._generation_seconds = 0.0

    def prepare(self) -> None:
        """Compiles what the first token needs, seconds for a new shape; iterating does it too."""
        self._compile(self._decoding.compile_prefill)

    def __iter__(self) -> Iterator[str]:
        """Yields the text piece by piece, as whole characters, as soon as they are certain.

        Raises:
          UsageError: it is not the first time. The cache holds the text already.
        """
        if self._begun:
            raise UsageError(
                "a generation is iterated over once: read its text, keep its iterator to go on later, "
                "or call generate again"
            )
        self._begun = True
        for piece in self._pieces():
            self.text += piece
            yield piece

    @property
    def grades(self) -> Grades | None:
        """Realised bits and activation_range_ratio of every decode step so far, numpy ``[steps, linears]``.

        None for an unquantized model. The order of the layers is that of ``decoder.linear_names``.
        """
        if not self._grades:
            return None
        return jax.tree.map(lambda *steps: np.concatenate(steps), *self._grades)

    def statistics(self) -> Statistics:
        """The figures so far; also for an unfinished generation."""
        return Statistics(
            prompt_tokens=self._prompt_tokens,
            generated_tokens=len(self.tokens),
            prompt_seconds=self._prompt_seconds,
            generation_seconds=self._generation_seconds,
            compile_seconds=self._compile_seconds,
            peak_memory_bytes=peak_memory(),
            **grade_statistics(self._model, self.grades),
        )

    def _pieces(self) -> Iterator[str]:
        for tokens in self._tokens():
            self.tokens += tokens
            text = "".join(self._stream.push(token) for token in tokens)
            ended = tokens[-1:] and tokens[-1] in self._stop_tokens
            piece = self._stop.push(text)
            if piece:
                yield piece
            if self._stop.met or ended:
                self.finish_reason = "stop"
                break
        if not self._stop.met:
            rest = self._stop.push(self._stream.flush()) + self._stop.flush()
            if rest:
                yield rest
        self.finish_reason = self.finish_reason or "length"

    def _tokens(self) -> Iterator[list[int]]:
        """New tokens chunk by chunk; only the model's time is on the clocks, not the consumer's."""
        self.prepare()
        first = self._decoding.prefill()
        self._prompt_seconds = first.seconds
        yield first.tokens[0]
        self._compile(self._decoding.compile_decode)  # the first piece of text need not wait for it
        for chunk in self._decoding.chunks():
            self._generation_seconds += chunk.seconds
            if chunk.grades is not None:
                self._grades.append(jax.tree.map(lambda steps: steps[:, 0], chunk.grades))
            yield chunk.tokens[0]

    def _compile(self, compile: Callable[[], None]) -> None:
        started = time.perf_counter()
        compile()
        self._compile_seconds += time.perf_counter() - started
