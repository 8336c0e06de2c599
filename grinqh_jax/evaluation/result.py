"""What a text says about one setting of the dial, and how sure that is."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from grinqh_jax.decoding.bits import Bits

PERCENTILES = (5, 25, 50, 75, 95)


class WindowSums(NamedTuple):
    """Sums over the predicted tokens of each window, and their number.

    Attributes:
      loss, reference_loss: ``-log p`` of the token that followed, nats, of the model and the reference.
      kl: ``KL(reference || model)`` of the predicted distributions, nats.
      same_top1: tokens where both find the same token most likely.
      bits, bits_without_head: bits read per weight, over all linear layers and without the output
        projection.
      tokens: predicted tokens.
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
    """How the bits per weight that a token is read with differ from token to token.

    Attributes:
      mean, deviation: over tokens.
      percentiles: by percentage, those of ``PERCENTILES``.
      loss_correlation: Pearson's, of a token's bits with the reference's loss on what follows it: above
        0, hard tokens take more bits. None where either does not vary.
    """

    mean: float
    deviation: float
    percentiles: Mapping[str, float]
    loss_correlation: float | None

    @classmethod
    def of(cls, bits: Float[np.ndarray, "n"], losses: Float[np.ndarray, "n"]) -> "TokenBits":
        """The distribution of the ``bits`` of some tokens, and what their losses have to do with it."""
        bits, losses = bits.astype(np.float64), losses.astype(np.float64)
        varies = bits.std() > 1e-6 and losses.std() > 1e-6
        return cls(
            mean=float(bits.mean()),
            deviation=float(bits.std()),
            percentiles={str(p): float(np.percentile(bits, p)) for p in PERCENTILES},
            loss_correlation=float(np.corrcoef(bits, losses)[0, 1]) if varies else None,
        )

    def line(self) -> str:
        """For people: one line."""
        spread = ", ".join(f"{p} % {value:.3f}" for p, value in self.percentiles.items())
        line = f"bits of a token: mean {self.mean:.3f}, deviation {self.deviation:.3f}; {spread}"
        if self.loss_correlation is None:
            return line
        return f"{line}; correlation with its loss {self.loss_correlation:+.2f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What ``perplexity.measure`` found at one setting of the dial.

    Standard errors are those of ``standard_error``, and None for a single window. Those of ``ratio`` and
    ``difference`` are paired: model and reference read the same tokens, so what makes a text hard for
    both cancels, and they tell differences that are a small part of ``stderr``.

    Attributes:
      bits: as asked.
      realised_bits: mean bits read per weight, over tokens and weights; scales not counted.
      realised_bits_without_head: the same without the output projection.
      perplexity, stderr: ``exp`` of the mean loss.
      difference, difference_stderr: perplexity less the reference's.
      ratio, ratio_stderr: perplexity over the reference's.
      kl, kl_stderr: mean over tokens of ``KL(reference || model)`` of the predicted distributions, nats.
      same_top1, same_top1_stderr: share of tokens where both find the same token most likely.
      tokens: predicted tokens; the first of each window is not predicted.
      token_bits: how ``realised_bits`` differ from token to token; None where nothing is graded.
      windows: what all this was computed from.
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
    def of(cls, bits: Bits, windows: WindowSums, token_bits: TokenBits | None) -> "Perplexity":
        """The figures that follow from the sums over each window."""
        count = windows.tokens
        mean = WindowSums(*(float(sums.sum() / count.sum()) for sums in windows))
        own, reference = math.exp(mean.loss), math.exp(mean.reference_loss)
        ratio = math.exp(mean.loss - mean.reference_loss)

        def error(sums: np.ndarray, factor: float = 1.0) -> float | None:
            found = standard_error(sums, count)
            return None if found is None else factor * found

        # exp is taken to first order: d exp(x) = exp(x) dx.
        return cls(
            bits=bits,
            realised_bits=mean.bits,
            realised_bits_without_head=mean.bits_without_head,
            perplexity=own,
            stderr=error(windows.loss, own),
            difference=own - reference,
            difference_stderr=error(own * windows.loss - reference * windows.reference_loss),
            ratio=ratio,
            ratio_stderr=error(windows.loss - windows.reference_loss, ratio),
            kl=mean.kl,
            kl_stderr=error(windows.kl),
            same_top1=mean.same_top1,
            same_top1_stderr=error(windows.same_top1),
            tokens=int(count.sum()),
            token_bits=token_bits,
            windows=windows,
        )

    def to_json(self) -> dict[str, Any]:
        """All fields but ``windows``, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["windows"]
        return fields | {"token_bits": self.token_bits and dataclasses.asdict(self.token_bits)}

    def cells(self) -> dict[str, Any]:
        """For people: the columns of a table."""
        return {
            "bits": self.bits,
            "bits read": f"{self.realised_bits:.3f}",
            "perplexity": with_error(self.perplexity, self.stderr, ".2f"),
            "of reference": with_error(self.ratio, self.ratio_stderr, ".4f"),
            "kl": with_error(self.kl, self.kl_stderr, ".5f"),
            "same top1": with_error(self.same_top1, self.same_top1_stderr, ".4f"),
            "tokens": self.tokens,
        }


def with_error(value: float, error: float | None, form: str) -> str:
    """``value ± error``, both in one format (``.2f``); the value alone where the error is not known."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


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
