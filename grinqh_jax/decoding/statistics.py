"""The figures of one generation: speed, bits and bytes that were really read, memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from grinqh_jax.decoding.engine import Grades
from grinqh_jax.model.decoder import Decoder, linear_names, linear_shapes
from pallas_kernels.layout import GROUP

BF16_BYTES = 2
SCALE_BITS = 16 / GROUP
"""Bits per weight of the float16 scales, which are read beside the graded planes."""

RANGE_RATIO_MARGIN = 1.5
"""Activations this many times larger than any met in calibration are worth a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of one generation. ``None`` where nothing was measured.

    Attributes:
      prompt_tokens, generated_tokens: counts; the first generated token comes from the prefill.
      prompt_seconds, generation_seconds: without compilation; the second is that of the tokens after
        the first.
      compile_seconds: before the first of them.
      realised_bits: mean bits read per weight over all decode steps and linear layers, each layer
        weighted by its number of weights; scales not counted.
      realised_bits_per_layer: the mean over steps, by linear layer.
      realised_bits_per_step: ``[steps, linears]``, layers as in ``realised_bits_per_layer``.
      bytes_per_token: weights that a decode step reads: the graded planes' share, scales, norms and
        one row of the embedding (not the cache). An implementation without skipping touches more.
      bytes_per_token_bf16: the same for the unquantized model.
      peak_memory_bytes: of the accelerator, or of the process where there is none.
      activation_range_ratio: ``max |x| / max_activation`` by linear layer, the largest of all steps.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    compile_seconds: float
    realised_bits: float | None
    realised_bits_per_layer: Mapping[str, float]
    realised_bits_per_step: Float[np.ndarray, "steps linears"] | None
    bytes_per_token: float | None
    bytes_per_token_bf16: float
    peak_memory_bytes: int
    activation_range_ratio: Mapping[str, float]

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Prompt tokens over the time of the prefill."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else None

    @property
    def generation_tokens_per_second(self) -> float | None:
        """Decoded tokens over the time of decoding; the prefill's token does not count."""
        decoded = self.generated_tokens - 1
        return decoded / self.generation_seconds if decoded > 0 and self.generation_seconds else None

    def lines(self) -> list[str]:
        """For people: one figure a line."""
        speeds = (
            ("prompt", self.prompt_tokens, self.prompt_tokens_per_second),
            ("generation", self.generated_tokens, self.generation_tokens_per_second),
        )
        lines = [
            f"{name}: {count} token{'s' * (count != 1)}" + (f", {speed:.1f} tokens/s" if speed else "")
            for name, count, speed in speeds
        ]
        if self.realised_bits is not None:
            lines.append(f"realised bits: {self.realised_bits:.3f} per weight")
        if self.bytes_per_token is not None:
            share = self.bytes_per_token / self.bytes_per_token_bf16
            lines.append(
                f"weights read per token: {self.bytes_per_token / 1e6:.3f} MB, {share:.1%} of "
                f"{self.bytes_per_token_bf16 / 1e6:.3f} MB in bf16"
            )
        lines.append(f"peak memory: {self.peak_memory_bytes / 2**20:.0f} MiB")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs: JSON values, all fields and both speeds."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.realised_bits_per_step is not None:
            fields["realised_bits_per_step"] = np.round(self.realised_bits_per_step, 4).tolist()
        return fields | {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "generation_tokens_per_second": self.generation_tokens_per_second,
        }

    def warning(self) -> str | None:
        """One line if activations left the calibrated range, else None."""
        beyond = {
            name: value
            for name, value in self.activation_range_ratio.items()
            if not value <= RANGE_RATIO_MARGIN
        }
        if not beyond:
            return None
        worst = max(beyond, key=lambda name: np.nan_to_num(beyond[name], nan=np.inf))
        linears = f"{len(beyond)} of {len(self.activation_range_ratio)} linear layers"
        return (
            f"activations left the calibrated range in {linears} "
            f"({beyond[worst]:.3g} times its largest in {worst}): bits and quality may be off; "
            "calibrate on text like this (convert --calib)"
        )


def grade_statistics(model: Decoder, grades: Grades | None) -> dict[str, Any]:
    """The fields of ``Statistics`` that follow from what the steps ``[steps, linears]`` really read."""
    names = linear_names(model.config)
    fields: dict[str, Any] = {
        "realised_bits": None,
        "realised_bits_per_layer": {},
        "realised_bits_per_step": None,
        "activation_range_ratio": {},
        "bytes_per_token": None,
        "bytes_per_token_bf16": _bytes_per_token(model, dict.fromkeys(names, 8 * BF16_BYTES)),
    }
    if not model.graded:
        fields["bytes_per_token"] = _bytes_per_token(model, dict.fromkeys(names, model.full_bits))
    elif grades is not None and len(grades.bits):
        bits = dict(zip(names, np.mean(grades.bits, axis=0, dtype=np.float64).tolist(), strict=True))
        fields |= {
            "realised_bits": weighted_mean(model, bits),
            "realised_bits_per_layer": bits,
            "realised_bits_per_step": grades.bits,
            "activation_range_ratio": dict(
                zip(names, np.max(grades.activation_range_ratio, axis=0).tolist(), strict=True)
            ),
            "bytes_per_token": _bytes_per_token(model, {n: b + SCALE_BITS for n, b in bits.items()}),
        }
    return fields


def weighted_mean(
    model: Decoder, bits: Mapping[str, float | Float[Array, "*any"]]
) -> float | Float[Array, "*any"]:
    """Mean bits per weight of the linear layers in ``bits``, from the mean, or means, of each."""
    sizes = {name: k * n for name, (k, n) in linear_shapes(model.config).items() if name in bits}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _bytes_per_token(model: Decoder, bits: Mapping[str, float]) -> float:
    config = model.config
    linears = sum(k * n * bits[name] / 8 for name, (k, n) in linear_shapes(config).items())
    norms = config.hidden_size * (2 * config.num_layers + 1)
    norms += 2 * config.head_dim * config.num_layers if config.qk_norm else 0
    return linears + BF16_BYTES * (norms + config.hidden_size)  # and one row of the embedding
