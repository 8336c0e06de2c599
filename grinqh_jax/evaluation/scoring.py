"""Log-likelihoods of continuations, every token read as in decoding."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.errors import UsageError
from grinqh_jax.model.apply import Dense, Graded
from grinqh_jax.model.decoder import Decoder

_LOGIT_BYTES = 1 << 28
"""Room for one batch of float32 logits; as many rows as fit are read at once, and at least one."""

_SHORTEST = 32
"""Rows are padded to 32, 64, 128 ... tokens to read, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
      log_likelihood: ``log p(continuation | context)``, nats.
      greedy: whether every token of it is the most likely one.
      bits: mean bits read per weight over the tokens read; None if nothing is graded.
      tokens: that were read.
    """

    log_likelihood: float
    greedy: bool
    bits: float | None
    tokens: int


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

    Contexts are graded like continuations: what is measured is how well the model does at these bits, not
    how well it does with a context that was read at full precision.

    Args:
      generator: model and tokenizer.
      pairs: tokens of a context, at least one, and of its continuation. Of a pair that is too long, the
        beginning of the context is dropped.
      bits: setting of the dial; ``"full"`` grades nothing. The dial does not follow the texts: a score
        depends on its own pair alone, and says what bits it read.
      max_length: most tokens read of a pair.
      batch: most pairs at a time.
      on_progress: called with the number of pairs done, batch by batch.

    Raises:
      UsageError: ``bits`` are out of the dial's range, a context is empty, a continuation is too long, or a
        token is outside the vocabulary.
    """
    dial, thresholds = generator.dial(bits), None
    if dial is not None and bits != "full":
        thresholds = {name: rows[0] for name, rows in dial.thresholds.items()}
    # The last token of a row is predicted, not read.
    rows = [[*context, *continuation][-max_length - 1 :] for context, continuation in pairs]
    for row, (context, continuation) in zip(rows, pairs, strict=True):
        generator.model.config.check_tokens(row)
        if not context or len(row) <= len(continuation):
            raise UsageError(
                f"a continuation of {len(continuation)} tokens after {len(context)}: it needs a context, "
                f"and one token of it must fit with the continuation into {max_length}"
            )
    found: list[Score | None] = [None] * len(pairs)
    for some, tokens in _batches(rows, batch, generator.model.config.vocab_size):
        log_p, greedy, read = _next_tokens(generator.model, tokens, thresholds)
        log_p, greedy = np.asarray(log_p, np.float64), np.asarray(greedy)
        read = None if read is None else np.asarray(read, np.float64)
        for line, i in enumerate(some):
            scored = slice(len(rows[i]) - 1 - len(pairs[i][1]), len(rows[i]) - 1)
            found[i] = Score(
                log_likelihood=float(log_p[line, scored].sum()),
                greedy=bool(greedy[line, scored].all()),
                bits=None if read is None else float(np.mean(read[line, : scored.stop])),
                tokens=scored.stop,
            )
        on_progress(len(some))
    return found


def _batches(
    rows: Sequence[Sequence[int]], batch: int, vocabulary: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "b t"]]]:
    """Indices of rows of similar lengths, longest first, and their tokens, padded to one of few shapes."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        width = _SHORTEST
        while width < len(rows[order[start]]) - 1:
            width *= 2
        most = max(1, min(batch, _LOGIT_BYTES // (4 * width * vocabulary)))
        some = order[start : start + most]
        size = min(most, 1 << (len(some) - 1).bit_length())
        tokens = np.zeros((size, width + 1), np.int32)
        for line, i in enumerate(some):
            tokens[line, : len(rows[i])] = rows[i]
        yield some, tokens
        start += len(some)


@jax.jit
def _next_tokens(model: Decoder, tokens: Int[Array, "b t"], thresholds: dict[str, Float[Array, "p"]] | None):
    """Log-probability of all tokens but the first, whether each is the likeliest, and bits ``[b, t - 1]``."""
    apply = Dense() if thresholds is None else Graded(thresholds)
    log_p = jax.nn.log_softmax(model(tokens[:, :-1], apply))
    following = tokens[:, 1:]
    chosen = jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
    read = None if thresholds is None else weighted_mean(model, apply.bits)
    return chosen, jnp.argmax(log_p, axis=-1) == following, read


def mean_bits(scores: Iterable[Score]) -> float | None:
    """Mean bits read per weight over the tokens of some scores; None if nothing was graded."""
    read = [(one.bits, one.tokens) for one in scores if one.bits is not None]
    if not read:
        return None
    bits, tokens = np.transpose(read)
    return float(np.average(bits, weights=tokens))
