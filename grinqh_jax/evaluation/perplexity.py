"""Perplexity and KL divergence of graded decoding, teacher-forced: every token is read as in decoding."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Integer

from grinqh_jax.apply import Graded
from grinqh_jax.decoder import Decoder
from grinqh_jax.errors import UsageError
from grinqh_jax.statistics import weighted_mean
from grinqh_jax.thresholds import model_thresholds

Bits = float | Literal["full"]
"""A setting of the dial, or ``full``: every plane, without grading."""

_LOGIT_BYTES = 1 << 28
"""Room for one batch of float32 logits; as many windows as fit are read at once, and at least one."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What ``measure`` found at one setting of the dial.

    A token's loss is ``-log p(token | the tokens before it in its window)``, in nats.

    Attributes:
      bits: as asked.
      realised_bits: mean bits read per weight, over tokens and weights.
      perplexity: ``exp`` of the mean loss.
      stderr: standard error of ``perplexity`` (see ``standard_error``).
      kl: mean over tokens of ``KL(reference || model)`` of the predicted distributions, in nats.
      same_top1: share of tokens where both find the same token most likely.
      ratio: perplexity over the reference's.
      tokens: predicted tokens; the first of each window is not predicted.
    """

    bits: Bits
    realised_bits: float
    perplexity: float
    stderr: float | None
    kl: float
    same_top1: float
    ratio: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def measure(
    model: Decoder,
    targets: Sequence[float] | None,
    tokens: Integer[np.ndarray, "n"],
    bits: Sequence[Bits],
    *,
    sequence_length: int = 1024,
    reference: Decoder | None = None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> list[Perplexity]:
    """Measures a text at several settings of the dial.

    The text is cut into windows that do not overlap, each read on its own from its first position. A
    shorter last window counts. Memory does not depend on the length of the text, and all settings
    run the same compiled program.

    Args:
      model: graded; or dense, if ``bits`` holds nothing but ``full``.
      targets: of the model's threshold tables; None for a dense model.
      tokens: of the text.
      bits: settings; results come in this order.
      sequence_length: tokens of a window.
      reference: what ``kl``, ``same_top1`` and ``ratio`` compare with; None: the model at full precision.
      progress: called with the number of tokens that all settings are done with, batch by batch.

    Raises:
      UsageError: fewer than two tokens, a token outside the vocabulary, windows shorter than two tokens, or
        a reference with another vocabulary.
    """
    _check(model, tokens, sequence_length, reference)
    thresholds = [
        None
        if setting == "full"
        else model_thresholds(model, jnp.asarray(targets, jnp.float32), jnp.float32(setting))
        for setting in bits
    ]
    found: list[list[Float64[np.ndarray, "w 6"]]] = [[] for _ in bits]
    for windows, lengths in _batches(tokens, sequence_length, model.config.vocab_size):
        full = _dense_logits(model, windows) if reference is None or "full" in bits else None
        compared = full if reference is None else _dense_logits(reference, windows)
        for sums, levels in zip(found, thresholds, strict=True):
            if levels is None:
                logits, realised = full, jnp.full(windows.shape, _full_bits(model), jnp.float32)
            else:
                logits, realised = _graded_logits(model, windows, levels)
            sums.append(np.asarray(_window_sums(logits, compared, realised, windows, lengths), np.float64))
        progress(int(lengths.sum()))
    return [_summary(setting, np.concatenate(sums)) for setting, sums in zip(bits, found, strict=True)]


def standard_error(sums: Float64[np.ndarray, "w"], counts: Float64[np.ndarray, "w"]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)``, each pair being one window.

    Losses within a window are correlated (an odd name is hard each time), so windows and not tokens
    are the independent draws: the linearised estimator of a ratio of means (Cochran, Sampling
    Techniques, section 6.3). None for fewer than two windows.
    """
    if len(sums) < 2:
        return None
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / counts.sum())


def _full_bits(model: Decoder) -> float:
    """Bits per weight that full precision reads: all planes, or a dense kernel's dtype."""
    if model.graded:
        return float(model.lm_head.weight.max_bits)
    return 8.0 * model.lm_head.kernel[...].dtype.itemsize


def _check(model: Decoder, tokens: np.ndarray, sequence_length: int, reference: Decoder | None) -> None:
    vocabulary = model.config.vocab_size
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; perplexity needs two or more")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise UsageError(
            f"the text has token {tokens.max()}, the model a vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model"
        )
    if sequence_length < 2:
        raise UsageError(f"sequence length {sequence_length}: a window needs two tokens or more")
    if reference is not None and reference.config.vocab_size != vocabulary:
        raise UsageError(
            f"the reference has a vocabulary of {reference.config.vocab_size}, the model one of "
            f"{vocabulary}; compare with the model that it was converted from"
        )


def _batches(
    tokens: np.ndarray, length: int, vocabulary: int
) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]]:
    """Windows in batches of one shape, padded with zeros, and the tokens in each (0 for a padding window)."""
    length = min(length, len(tokens))
    windows = -(-len(tokens) // length)
    most = max(1, _LOGIT_BYTES // (4 * length * vocabulary))
    batches = -(-windows // most)
    batch = -(-windows // batches)
    padded = np.zeros((batches * batch, length), np.int32)
    padded.reshape(-1)[: len(tokens)] = tokens
    lengths = np.clip(len(tokens) - length * np.arange(len(padded)), 0, length)
    for start in range(0, len(padded), batch):
        yield padded[start : start + batch], lengths[start : start + batch]


@jax.jit
def _dense_logits(model: Decoder, windows: Int[Array, "b t"]) -> Float[Array, "b t v"]:
    return model(windows)


@jax.jit
def _graded_logits(model: Decoder, windows: Int[Array, "b t"], thresholds: dict[str, Float[Array, "p"]]):
    """Logits ``[b, t, v]`` and realised bits ``[b, t]`` with every linear layer graded."""
    graded = Graded(thresholds)
    logits = model(windows, graded)
    return logits, weighted_mean(model, graded.bits)


@jax.jit
def _window_sums(
    logits: Float[Array, "b t v"],
    compared: Float[Array, "b t v"],
    realised: Float[Array, "b t"],
    windows: Int[Array, "b t"],
    lengths: Int[Array, "b"],
) -> Float[Array, "b 6"]:
    """Sums over each window: loss, reference's loss, KL, same top-1, realised bits; and predicted tokens."""
    position = jnp.arange(windows.shape[1])
    predicted = (position[1:] < lengths[:, None]).astype(jnp.float32)
    read = (position < lengths[:, None]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    log_reference = jax.nn.log_softmax(compared[:, :-1])

    def loss(log_probabilities):
        return -jnp.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1)[..., 0]

    per_token = (
        loss(log_p),
        loss(log_reference),
        jnp.sum(jnp.exp(log_reference) * (log_reference - log_p), axis=-1),
        (jnp.argmax(log_p, axis=-1) == jnp.argmax(log_reference, axis=-1)).astype(jnp.float32),
    )
    sums = [jnp.sum(value * predicted, axis=-1) for value in per_token]
    # Scaled to the predicted tokens, so that all columns have the same denominator.
    share = jnp.sum(predicted, axis=-1) / jnp.maximum(jnp.sum(read, axis=-1), 1)
    return jnp.stack([*sums, jnp.sum(realised * read, axis=-1) * share, jnp.sum(predicted, axis=-1)], axis=-1)


def _summary(bits: Bits, sums: Float64[np.ndarray, "w 6"]) -> Perplexity:
    sums = sums[sums[:, -1] > 0]
    count = sums[:, -1].sum()
    loss, reference_loss, kl, same, realised = (sums[:, :-1].sum(axis=0) / count).tolist()
    error = standard_error(sums[:, 0], sums[:, -1])
    return Perplexity(
        bits=bits,
        realised_bits=realised,
        perplexity=math.exp(loss),
        stderr=None if error is None else math.exp(loss) * error,  # first order: d exp(x) = exp(x) dx
        kl=kl,
        same_top1=same,
        ratio=math.exp(loss - reference_loss),
        tokens=int(count),
    )
