"""Perplexity results at one setting of the dial, with standard errors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from grinqh_jax.decoding.bits import Bits

PERCENTILES = (5, 25, 50, 75, 95)
"""Percentiles that ``TokenBits`` reports."""


class WindowSums(NamedTuple):
    """Sums over the predicted tokens of each window.

    Attributes:
      loss, reference_loss: ``-log p`` of the next token under the model, and under the reference, nats.
      kl: ``KL(reference || model)`` of the predicted distributions, nats.
      same_top1: Number of tokens for which model and reference predict the same most probable next token.
      bits: Mean bits read per weight of all linear layers.
      bits_without_head: The same without the output projection.
      tokens: Number of predicted tokens.
    """

    loss: Float64[np.ndarray, "w"]
    reference_loss: Float64[np.ndarray, "w"]
    kl: Float64[np.ndarray, "w"]
    same_top1: Float64[np.ndarray, "w"]
    bits: Float64[np.ndarray, "w"]
    bits_without_head: Float64[np.ndarray, "w"]
    tokens: Float64[np.ndarray, "w"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBits:
    """Distribution over tokens of the bits read per weight.

    Attributes:
      mean, deviation: Mean and standard deviation.
      percentiles: Bits by percentage, for ``PERCENTILES``.
      loss_correlation: Pearson correlation between the bits of a token and the reference's loss on the next
        token. It is positive if hard tokens take more bits, and None if either is constant.
    """

    mean: float
    deviation: float
    percentiles: Mapping[str, float]
    loss_correlation: float | None

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, bits: Float[np.ndarray, "n"], losses: Float[np.ndarray, "n"]) -> "TokenBits":
        """Summarizes the ``bits`` of tokens and their correlation with ``losses`` (nats)."""
        bits, losses = bits.astype(np.float64), losses.astype(np.float64)
        varies = bits.std() > 1e-6 and losses.std() > 1e-6
        return cls(
            mean=float(bits.mean()),
            deviation=float(bits.std()),
            percentiles={str(p): float(np.percentile(bits, p)) for p in PERCENTILES},
            loss_correlation=float(np.corrcoef(bits, losses)[0, 1]) if varies else None,
        )

    def line(self) -> str:
        """Returns a one-line summary."""
        spread = ", ".join(f"{p} % {value:.3f}" for p, value in self.percentiles.items())
        line = f"bits per token: mean {self.mean:.3f}, deviation {self.deviation:.3f}; {spread}"
        if self.loss_correlation is None:
            return line
        return f"{line}; correlation with the loss {self.loss_correlation:+.2f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Result of ``perplexity.measure`` at one setting of the dial.

    Standard errors come from ``standard_error`` and are None for a single window. The errors of ``ratio`` and
    ``difference`` are paired: model and reference read the same tokens, so the difficulty of the text
    cancels. They are therefore much smaller than ``stderr``.

    Attributes:
      bits: Setting of the dial.
      realised_bits: Mean bits read per weight, over tokens and weights, without scales.
      realised_bits_without_head: The same without the output projection.
      perplexity, stderr: ``exp`` of the mean loss, and its standard error.
      difference, difference_stderr: Perplexity minus the reference's.
      ratio, ratio_stderr: Perplexity divided by the reference's.
      kl, kl_stderr: Mean over tokens of ``KL(reference || model)`` of the predicted distributions, nats.
      same_top1, same_top1_stderr: Share of tokens whose most probable next token is the same for model and
        reference.
      tokens: Number of predicted tokens. The first token of each window is not predicted.
      token_bits: Distribution of bits over tokens; None at full precision.
      windows: Sums that all figures are computed from.
    """

    bits: Bits
    realised_bits: float
    realised_bits_without_head: float
    perplexity: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    ratio: float
    ratio_stderr: float | None
    kl: float
    kl_stderr: float | None
    same_top1: float
    same_top1_stderr: float | None
    tokens: int
    token_bits: TokenBits | None
    windows: WindowSums = dataclasses.field(repr=False, compare=False)

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def of(cls, bits: Bits, windows: WindowSums, token_bits: TokenBits | None) -> "Perplexity":
        """Computes all figures from the sums over each window.

        A perplexity that overflows is infinite, and its difference to another infinite one is NaN.
        """
        count = windows.tokens
        mean = {name: float(sums.sum() / count.sum()) for name, sums in windows._asdict().items()}
        perplexity, reference = exp(mean["loss"]), exp(mean["reference_loss"])
        ratio = exp(mean["loss"] - mean["reference_loss"])

        def error(sums: np.ndarray, factor: float = 1.0) -> float | None:
            value = standard_error(sums, count)
            return None if value is None else factor * value

        # Errors pass through exp to first order: d exp(x) = exp(x) dx.
        return cls(
            bits=bits,
            realised_bits=mean["bits"],
            realised_bits_without_head=mean["bits_without_head"],
            perplexity=perplexity,
            stderr=error(windows.loss, perplexity),
            difference=perplexity - reference,
            difference_stderr=error(perplexity * windows.loss - reference * windows.reference_loss),
            ratio=ratio,
            ratio_stderr=error(windows.loss - windows.reference_loss, ratio),
            kl=mean["kl"],
            kl_stderr=error(windows.kl),
            same_top1=mean["same_top1"],
            same_top1_stderr=error(windows.same_top1),
            tokens=int(count.sum()),
            token_bits=token_bits,
            windows=windows,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all fields except ``windows``, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["windows"]
        return fields | {"token_bits": self.token_bits and dataclasses.asdict(self.token_bits)}

    def cells(self) -> dict[str, Any]:
        """Returns the cells of a table row by column title."""
        return {
            "bits": self.bits,
            "bits read": f"{self.realised_bits:.3f}",
            "perplexity": with_error(self.perplexity, self.stderr, ".2f"),
            "ratio": with_error(self.ratio, self.ratio_stderr, ".4f"),
            "KL (nats)": with_error(self.kl, self.kl_stderr, ".5f"),
            "same top token": with_error(self.same_top1, self.same_top1_stderr, ".4f"),
            "tokens": self.tokens,
        }


def exp(value: float) -> float:
    """Returns the exponential, infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def with_error(value: float, error: float | None, form: str) -> str:
    """Formats ``value ± error``, both with the format ``form`` (``.2f``); an error of None is left out."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def standard_error(sums: Float64[np.ndarray, "w"], counts: Float64[np.ndarray, "w"]) -> float | None:
    """Returns the standard error of ``sum(sums) / sum(counts)``; None for fewer than two windows.

    Losses within a window are correlated (a rare name is hard each time it occurs), so the windows, not the
    tokens, are the independent samples. This is the linearised estimator of the error of a ratio of means
    (Cochran, Sampling Techniques, section 6.3).

    Args:
      sums: Sum over the tokens of each window.
      counts: Number of tokens of each window.
    """
    if len(sums) < 2:
        return None
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / counts.sum())
