"""Log-likelihoods of continuations, with every token graded as in decoding."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.errors import UsageError
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh
from pallas_kernels.x64 import without_x64

_LOGIT_BYTES = 1 << 28
"""Bytes for the float32 logits of a batch, which limit its number of rows. One row is always allowed."""

_SMALLEST_WIDTH = 32
"""Rows are padded to 32, 64, 128, ... tokens, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Score of one continuation.

    Attributes:
      log_likelihood: ``log p(continuation | context)``, nats.
      greedy: Whether every token of the continuation is the most probable one.
      bits: Mean bits read per weight, over the tokens read; None at full precision.
      tokens: Number of tokens read.
    """

    log_likelihood: float
    greedy: bool
    bits: float | None
    tokens: int


@without_x64
def score(
    generator: Generator,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    bits: Bits | None,
    *,
    max_length: int,
    batch: int = 64,
    on_progress: Callable[[int], Any] = lambda pairs: None,
) -> list[Score]:
    """Scores continuations of contexts.

    Contexts are graded like continuations, so scores measure the model at these bits, not a model with a
    context read at full precision.

    Args:
      generator: Model and tokenizer.
      pairs: Tokens of each context and of its continuation. A context has at least one token. If a pair is
        too long, the start of its context is dropped.
      bits: Setting of the dial; ``"full"`` grades nothing. The dial does not adapt to the texts, so a score
        depends on its own pair only. ``Score.bits`` reports the bits read.
      max_length: Largest number of tokens read per pair.
      batch: Largest number of pairs read together.
      on_progress: Called with the number of pairs in a batch after each batch.

    Raises:
      UsageError: ``bits`` are out of the dial's range, a context is empty, a continuation is too long, or a
        token is outside the vocabulary.
    """
    dial, thresholds = generator.dial(bits), None
    if dial is not None and bits != FULL:
        thresholds = {name: rows[0] for name, rows in dial.thresholds.items()}
    # The last token of a row is predicted and not read.
    rows = [[*context, *continuation][-max_length - 1 :] for context, continuation in pairs]
    for read_tokens, (context, continuation) in zip(rows, pairs, strict=True):
        generator.model.config.check_tokens(read_tokens)
        if not context or len(read_tokens) <= len(continuation):
            raise UsageError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens: at least one "
                f"token of the context must fit with the continuation into {max_length} tokens"
            )
    scores: dict[int, Score] = {}
    model = FlatModel(generator.model)
    for indices, tokens in _batches(rows, batch, generator.model.config.vocab_size):
        log_p, greedy, read = _next_tokens(model, tokens, thresholds)
        log_p, greedy = np.asarray(log_p, np.float64), np.asarray(greedy)
        read = None if read is None else np.asarray(read, np.float64)
        for row, i in enumerate(indices):
            scored = slice(len(rows[i]) - 1 - len(pairs[i][1]), len(rows[i]) - 1)
            scores[i] = Score(
                log_likelihood=float(log_p[row, scored].sum()),
                greedy=bool(greedy[row, scored].all()),
                bits=None if read is None else float(np.mean(read[row, : scored.stop])),
                tokens=scored.stop,
            )
        on_progress(len(indices))
    return [scores[i] for i in range(len(pairs))]


def _batches(
    rows: Sequence[Sequence[int]], batch: int, vocabulary: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "b t"]]]:
    """Yields batches, longest rows first: the indices of the rows, and their padded tokens.

    A batch may have more rows than indices, because the number of rows is padded to a power of two.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        width = _SMALLEST_WIDTH
        while width < len(rows[order[start]]) - 1:
            width *= 2
        most = max(1, min(batch, _LOGIT_BYTES // (4 * width * vocabulary)))
        indices = order[start : start + most]
        size = min(most, 1 << (len(indices) - 1).bit_length())
        tokens = np.zeros((size, width + 1), np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(rows[i])] = rows[i]
        yield indices, tokens
        start += len(indices)


@jax.jit
@on_mesh
def _next_tokens(
    model: FlatModel, tokens: Int[Array, "b t"], thresholds: dict[str, Float[Array, "p"]] | None
):
    """Scores the prediction of every token but the first.

    Returns:
      ``[b, t - 1]`` each: log-probability of the token; whether it is the most probable one; mean bits read
      per weight of the token before it, None at full precision.
    """
    graded, decoder = None if thresholds is None else Graded(thresholds), model.module
    log_p = jax.nn.log_softmax(decoder(tokens[:, :-1], graded))
    following = tokens[:, 1:]
    chosen = jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
    read = None if graded is None else weighted_mean(decoder, graded.bits)
    return chosen, jnp.argmax(log_p, axis=-1) == following, read


def mean_bits(scores: Iterable[Score]) -> float | None:
    """Returns the mean bits read per weight over the tokens of the scores; None at full precision."""
    read = [(score.bits, score.tokens) for score in scores if score.bits is not None]
    if not read:
        return None
    bits, tokens = np.transpose(read)
    return float(np.average(bits, weights=tokens))
