"""Perplexity and KL divergence of a text, teacher-forced, with every token graded as in decoding."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Integer

from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.dial import Dial, layer_shares
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.decoding.thresholds import Thresholds
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.result import Perplexity, TokenBits, WindowSums
from grinqh_jax.model.apply import Graded, in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh
from grinqh_jax.text.documents import read_documents
from pallas_kernels.x64 import without_x64


class _Comparison(NamedTuple):
    """Comparison of model and reference for each predicted token (see ``WindowSums`` for the fields)."""

    loss: Float[Array, "b t"]
    reference_loss: Float[Array, "b t"]
    kl: Float[Array, "b t"]
    same_top1: Float[Array, "b t"]


class _Realised(NamedTuple):
    """Mean bits read per weight for each token, with and without the output projection."""

    all: Float[np.ndarray, "b t"]
    without_head: Float[np.ndarray, "b t"]


def read_tokens(model: Generator | ModelFiles, path: Path, limit: int | None) -> Int32[np.ndarray, "n"]:
    """Tokenizes a text file, or a ``.jsonl`` file of documents, with an end-of-text token between documents.

    Args:
      model: Supplies the tokenizer and, if the model names one, the end-of-text token.
      path: File that ``text.documents.read_documents`` reads.
      limit: Largest number of tokens to return; None returns all.

    Raises:
      UsageError: the file cannot be read, is not UTF-8, holds no text, or has bad records.
    """
    separator = list(model.defaults.eos_tokens[:1])
    tokens: list[int] = []
    for document in read_documents(path):
        if limit is not None and len(tokens) >= limit:
            break
        tokens += (separator if tokens else []) + model.tokenizer.encode(document)
    return np.array(tokens[:limit], np.int32)


@without_x64
def measure(
    model: Decoder,
    targets: Sequence[float] | None,
    tokens: Integer[np.ndarray, "n"],
    bits: Sequence[Bits],
    *,
    sequence_length: int = 1024,
    reference: Decoder | None = None,
    on_progress: Callable[[int], Any] = lambda tokens: None,
) -> list[Perplexity]:
    """Measures the perplexity of a text at several settings of the dial.

    The text is cut into windows that do not overlap. Each window is read from position 0, one after another;
    the dial applies what it learns from a window to the following ones. The last window may be shorter.
    Memory grows by a few numbers per token of the text. All settings run the same compiled program.

    Args:
      model: A graded model; a dense one if ``bits`` contains only ``"full"``.
      targets: Mean bits of the rows of the model's threshold tables; None for a dense model.
      tokens: Tokens of the text.
      bits: Settings of the dial; the results have the same order.
      sequence_length: Tokens per window.
      reference: Model to compare with; None compares with ``model`` at full precision.
      on_progress: Called with the number of tokens of a window once all settings have read it.

    Raises:
      UsageError: the text has fewer than two tokens, or a token outside the vocabulary; windows are shorter
        than two tokens or longer than the context of a model; the reference has another vocabulary; or bits
        are out of the dial's range.
    """
    check(model.config, tokens, sequence_length, None if reference is None else reference.config)
    if targets is None:
        if graded := [setting for setting in bits if setting != FULL]:
            raise UsageError(
                f"bits {graded[0]:g}: the model is not quantized and runs at full precision only"
            )
        targets = ()
    dials = [
        None if setting == FULL else Dial.create(model, targets, np.array([setting], float))
        for setting in bits
    ]
    collectors = [_Collector() for _ in bits]
    flat = FlatModel(model)
    flat_reference = flat if reference is None else FlatModel(reference)
    for windows, lengths in _windows(tokens, sequence_length, padded=not model.config.long_text):
        full_logits = _dense_logits(flat, windows) if reference is None or FULL in bits else None
        reference_logits = full_logits if reference is None else _dense_logits(flat_reference, windows)
        predicted = np.arange(1, windows.shape[1]) < lengths[:, None]
        for i, (collector, dial) in enumerate(zip(collectors, dials, strict=True)):
            if dial is None:
                logits, realised = full_logits, _full_bits(model, windows.shape)
            else:
                logits, by_linear = _graded_logits(flat, windows, dial.thresholds)
                dials[i] = dial.observe(by_linear, lengths)
                realised = _realised(model, by_linear)
            collector.add(compare(logits, reference_logits, windows), realised, predicted)
        on_progress(int(lengths.sum()))
    return [
        collector.summary(setting, graded=dial is not None)
        for setting, collector, dial in zip(bits, collectors, dials, strict=True)
    ]


class _Collector:
    """Collects the values of all windows at one setting, on the host."""

    def __init__(self):
        self._sums: list[WindowSums] = []
        self._bits: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

    def add(self, comparison: _Comparison, realised: _Realised, predicted: Bool[np.ndarray, "b t"]) -> None:
        """Adds a batch of windows. Tokens that are not ``predicted`` are padding."""
        counts = np.sum(predicted, axis=1)
        # Reading the last token of a window predicts nothing, so its bits do not count.
        read = [bits[:, :-1] for bits in realised]
        columns = [*map(np.asarray, comparison), *read, np.ones_like(predicted)]
        sums = [np.where(predicted, column, 0).astype(np.float64).sum(axis=1) for column in columns]
        self._sums.append(WindowSums(*(column[counts > 0] for column in sums)))
        self._bits.append(read[0][predicted])
        self._losses.append(np.asarray(comparison.reference_loss)[predicted])

    def summary(self, bits: Bits, *, graded: bool) -> Perplexity:
        """Computes the result over all windows."""
        windows = WindowSums(*map(np.concatenate, zip(*self._sums, strict=True)))
        read, losses = np.concatenate(self._bits), np.concatenate(self._losses)
        return Perplexity.of(bits, windows, TokenBits.of(read, losses) if graded else None)


def _full_bits(model: Decoder, shape: tuple[int, ...]) -> _Realised:
    """Returns the bits read at full precision: all planes, or the dtype of a dense kernel."""
    return _Realised(*2 * (np.full(shape, model.full_bits, np.float32),))


def check(
    config: ModelConfig,
    tokens: Integer[np.ndarray, "n"],
    sequence_length: int,
    reference: ModelConfig | None = None,
) -> None:
    """Checks the arguments of ``measure`` against the configurations of model and reference.

    Raises:
      UsageError: ``measure`` raises it.
    """
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; perplexity needs two or more")
    config.check_tokens(tokens.tolist())
    if sequence_length < 2:
        raise UsageError(f"sequence length {sequence_length}: a window needs two tokens or more")
    positions = min(one.longest_text for one in (config, reference or config))
    if sequence_length > positions:
        raise UsageError(
            f"sequence length {sequence_length}: the context of the model has {positions} tokens; "
            f"use {positions} or less"
        )
    if reference is not None and reference.vocab_size != config.vocab_size:
        raise UsageError(
            f"the reference has a vocabulary of {reference.vocab_size}, the model one of "
            f"{config.vocab_size}; use the checkpoint that the model was converted from"
        )


def _windows(
    tokens: np.ndarray, length: int, padded: bool
) -> Iterator[tuple[Int[np.ndarray, "1 t"], Int[np.ndarray, "1"]]]:
    """Yields each window and its number of tokens.

    If ``padded``, the last one is padded with zeros to ``length``, which saves a compilation. With LongRoPE
    the frequencies depend on the number of tokens.
    """
    length = min(length, len(tokens))
    for start in range(0, len(tokens), length):
        window = tokens[start : start + length]
        padding = length - len(window) if padded else 0
        yield np.pad(window, (0, padding))[None].astype(np.int32), np.array([len(window)])


@jax.jit
@on_mesh
def _dense_logits(model: FlatModel, windows: Int[Array, "b t"]) -> Float[Array, "b t v"]:
    return model.module(windows)


@jax.jit
@on_mesh
def _graded_logits(model: FlatModel, windows: Int[Array, "b t"], thresholds: Thresholds):
    """Returns graded logits ``[b, t, v]`` and the bits that each linear layer read, ``[b, t, linears]``."""
    graded, decoder = Graded(thresholds), model.module
    logits = decoder(windows, graded)
    bits = graded.bits
    return logits, jnp.stack([bits[name] for name in linear_names(decoder.config)], axis=-1)


def _realised(model: Decoder, by_linear: Float[Array, "b t linears"]) -> _Realised:
    """Averages the bits of the linear layers over their weights."""
    bits, shares = np.asarray(by_linear), layer_shares(model.config)
    layers = np.where([in_head(name) for name in linear_names(model.config)], 0, shares)
    return _Realised(bits @ shares, bits @ (layers / layers.sum()))


@jax.jit
def compare(
    logits: Float[Array, "b t v"], reference_logits: Float[Array, "b t v"], windows: Int[Array, "b t"]
) -> _Comparison:
    """Scores the prediction of the next token at all positions but the last."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    log_reference = jax.nn.log_softmax(reference_logits[:, :-1])

    def loss(log_probabilities):
        return -jnp.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1)[..., 0]

    return _Comparison(
        loss=loss(log_p),
        reference_loss=loss(log_reference),
        kl=jnp.sum(jnp.exp(log_reference) * (log_reference - log_p), axis=-1),
        same_top1=(jnp.argmax(log_p, axis=-1) == jnp.argmax(log_reference, axis=-1)).astype(jnp.float32),
    )
