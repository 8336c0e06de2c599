"""Completes many prompts in batches: prefill at full precision, then graded decoding, as in ``generate``."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grinqh_jax.decoding.batch import Decoding, NewTokens
from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels.x64 import without_x64


class DecodedBits:
    """Adds up the bits that each linear layer reads over decode steps."""

    def __init__(self):
        self._sums: Any = 0.0  # float64 [linears] once something is added
        self._tokens = 0

    def add(self, new: NewTokens, rows: int) -> None:
        """Adds the bits that the first ``rows`` rows of a decode chunk read."""
        if new.grading_stats is None:
            return
        bits = new.grading_stats.bits[:, :rows]
        counts = np.array([len(tokens) for tokens in new.tokens[:rows]])
        valid = np.arange(len(bits))[:, None] < counts
        self._sums = self._sums + np.sum(bits, axis=(0, 1), where=valid[..., None])
        self._tokens += int(counts.sum())

    def mean(self, model: Decoder, *, head: bool = True) -> float | None:
        """Returns the mean bits read per weight; None if nothing was graded.

        Args:
          model: Model that decoded.
          head: Whether to include the output projection.
        """
        if not self._tokens:
            return None
        by_name = zip(linear_names(model.config), (self._sums / self._tokens).tolist(), strict=True)
        return float(weighted_mean(model, {n: bits for n, bits in by_name if head or not in_head(n)}))


@dataclasses.dataclass(frozen=True)
class Completions:
    """Generated texts in the order of their prompts, and the bits that decoding read."""

    texts: list[str]
    bits: DecodedBits


@without_x64
def complete(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    bits: Bits,
    *,
    max_tokens: int,
    batch: int,
    ended: Callable[[str], bool],
    sampling: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], Any] = lambda prompts: None,
) -> Completions:
    """Completes every prompt.

    Prompts are read at full precision; decoding is graded. A completion ends with a stop token of the model,
    after ``max_tokens`` tokens, or when ``ended`` returns true. Another setting of the dial compiles nothing.

    Args:
      generator: Model and tokenizer.
      prompts: Tokens of each prompt. There is at least one prompt.
      bits: Setting of the dial.
      max_tokens: Largest number of tokens per completion.
      batch: Largest number of prompts decoded together. All batches have the same size.
      ended: Predicate on the text generated so far, called after every decode chunk. True ends the
        completion.
      sampling: Parameters of ``Sampling.create``; greedy by default.
      on_progress: Called with the number of prompts in a batch after each batch.

    Raises:
      UsageError: ``bits`` are out of the dial's range; a prompt is empty, longer than the model's context, or
        has a token outside the vocabulary.
    """
    for prompt in prompts:
        generator.model.config.check_tokens(prompt)
    batches = -(-len(prompts) // batch)
    batch = -(-len(prompts) // batches)
    # Sorted by length, so that the prompts of a batch, and mostly their completions, have similar lengths.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts, counter = [""] * len(prompts), DecodedBits()
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        decoding = Decoding(
            generator.model,
            [prompts[i] for i in rows] + [prompts[rows[0]]] * (batch - len(rows)),
            max_tokens=max_tokens,
            max_context=generator.model.config.max_position_embeddings,
            dial=generator.dial(bits, batch),
            sampling=Sampling.create(batch, **(sampling or {})),
            stop_tokens=generator.defaults.eos_tokens,
        )
        for i, text in zip(rows, _texts(generator, decoding, len(rows), batch, ended, counter), strict=True):
            texts[i] = text
        on_progress(len(rows))
    return Completions(texts, counter)


def _texts(
    generator: Generator,
    decoding: Decoding,
    rows: int,
    batch: int,
    ended: Callable[[str], bool],
    counter: DecodedBits,
) -> list[str]:
    """Returns the texts of the first ``rows`` rows; the other rows only fill the batch."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    texts = [""] * rows

    def append(new: NewTokens) -> None:
        stopped = np.ones(batch, bool)
        for row in range(rows):
            tokens[row] += new.tokens[row]
            texts[row] = generator.tokenizer.decode(tokens[row])
            stopped[row] = ended(texts[row])
        counter.add(new, rows)
        decoding.stop(stopped)

    append(decoding.prefill())
    for new in decoding.chunks():
        append(new)
    return texts
