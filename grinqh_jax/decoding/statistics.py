"""The figures of a generation: speed, bits and bytes that were read, memory."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grinqh_jax.decoding.reading import MAX_GRADED_ROWS, WeightReading
from grinqh_jax.decoding.speculation.figures import SpeculationFigures
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.experts import DenseExperts
from grinqh_jax.model.linear import DenseLinear
from grinqh_jax.model.parameters import axis_sizes, router_projections
from grinqh_jax.model.weight_counts import vector_bytes_read, weights_read
from pallas_kernels import GradingStats
from pallas_kernels.layout import GROUP

BF16_BYTES = 2
SCALE_BITS = 16 / GROUP
"""Bits per weight of the float16 scales, which are read beside the graded planes."""

SHOWN_SECONDS = 0.05
"""Least time of compilation that ``Statistics.lines`` names."""

RANGE_RATIO_MARGIN = 1.5
"""Activation range ratio above which a warning is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of one generation. A figure that was not measured is ``None``.

    Attributes:
      prompt_tokens: Number of prompt tokens, reused ones included.
      reused_prompt_tokens: Number of prompt tokens whose keys and values came from a ``PromptCache``.
      generated_tokens: Number of generated tokens. The first comes from the prefill.
      prompt_seconds: Time of the prefill, without compilation.
      generation_seconds: Time of the tokens after the first, without compilation.
      compile_seconds: Time of compilation.
      realised_bits: Mean bits read per weight over all decode steps and linear layers, each layer weighted
        by its number of weights; scales not counted. Of a mixture, the chosen experts count.
      realised_bits_per_layer: Mean over steps, by linear layer.
      realised_bits_per_step: ``[steps, linears]``, layers in the order of ``realised_bits_per_layer``.
      bytes_per_token: Bytes of weights that a decode step reads: the planes that levels reach, scales, norms,
        routers and one row of the embedding, without the KV cache; of a mixture, those of the chosen experts.
        An implementation that cannot skip reads more.
      bytes_per_token_bf16: The same for the unquantized model in bfloat16.
      reading: How decode steps read weights: ``"graded"``; ``"one level"``, all channels at the same level,
        in an engine with many slots; or ``"dense"``, in an unquantized model.
      dense_dtype: Dtype in which an unquantized model keeps its weights; None for a graded model.
      peak_memory_bytes: Peak memory of the accelerator, or of the process if there is none.
      activation_range_ratio: Largest ``|x|`` of all decode steps over the largest in calibration, by linear
        layer.
      speculation: Figures of speculation; None without.
    """

    prompt_tokens: int
    reused_prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    compile_seconds: float
    realised_bits: float | None
    realised_bits_per_layer: Mapping[str, float]
    realised_bits_per_step: Float[np.ndarray, "steps linears"] | None
    bytes_per_token: float | None
    bytes_per_token_bf16: float
    reading: WeightReading
    dense_dtype: str | None
    peak_memory_bytes: int
    activation_range_ratio: Mapping[str, float]
    speculation: SpeculationFigures | None = None

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Prompt tokens read per second of prefill; reused tokens do not count."""
        read = self.prompt_tokens - self.reused_prompt_tokens
        return read / self.prompt_seconds if self.prompt_seconds else None

    @property
    def generation_tokens_per_second(self) -> float | None:
        """Decoded tokens per second of decoding; the first token does not count."""
        decoded = self.generated_tokens - 1
        return decoded / self.generation_seconds if decoded > 0 and self.generation_seconds else None

    def lines(self) -> list[str]:
        """Returns the figures for people, one a line."""
        reused = f" ({self.reused_prompt_tokens} reused)" if self.reused_prompt_tokens else ""
        lines = [
            f"{name}: {count} token{'s' * (count != 1)}{note}" + (f", {speed:.1f} tokens/s" if speed else "")
            for name, count, note, speed in (
                ("prompt", self.prompt_tokens, reused, self.prompt_tokens_per_second),
                ("generation", self.generated_tokens, "", self.generation_tokens_per_second),
            )
        ]
        if self.realised_bits is not None:
            lines.append(f"realised bits: {self.realised_bits:.3f} per weight{self._reason()}")
        if self.dense_dtype is not None and self.bytes_per_token is not None:
            lines.append(
                f"weights read per token: {self.bytes_per_token / 1e6:.3f} MB, all of them, unquantized in "
                f"{self.dense_dtype}"
            )
        elif self.bytes_per_token is not None:
            share = self.bytes_per_token / self.bytes_per_token_bf16
            lines.append(
                f"weights read per token: {self.bytes_per_token / 1e6:.3f} MB, {share:.1%} of "
                f"{self.bytes_per_token_bf16 / 1e6:.3f} MB in bf16"
            )
        if self.speculation is not None:
            lines.append(self.speculation.line(self.realised_bits))
        lines.append(f"peak memory: {self.peak_memory_bytes / 2**20:.0f} MiB")
        if self.compile_seconds >= SHOWN_SECONDS:
            lines.append(f"compilation: {self.compile_seconds:.1f} s, not part of these speeds")
        return lines

    def _reason(self) -> str:
        """Returns why the bits read may exceed those asked for, after a comma; else nothing."""
        if self.reading != "one level":
            return ""
        return f", all channels at one level, because more than {MAX_GRADED_ROWS} texts are decoded together"

    def to_json(self) -> dict[str, Any]:
        """Returns the figures for programs: all fields and both speeds as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.realised_bits_per_step is not None:
            fields["realised_bits_per_step"] = np.round(self.realised_bits_per_step, 4).tolist()
        if self.speculation is not None:
            fields["speculation"] = self.speculation.to_json(self.realised_bits)
        return fields | {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "generation_tokens_per_second": self.generation_tokens_per_second,
        }

    def warning(self) -> str | None:
        """Returns one line if activations left the calibrated range, else None."""
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
            f"(up to {beyond[worst]:.3g} times the largest in calibration, in {worst}): bits and quality may "
            "be off; calibrate on text like this (convert --calib)"
        )


def joined(stats: Sequence[GradingStats]) -> GradingStats | None:
    """Joins statistics, numpy ``[steps, linears]``, of consecutive decode steps; None if there are none."""
    if not stats:
        return None
    return jax.tree.map(lambda *steps: np.concatenate(steps), *stats)


def grading_fields(
    model: Decoder,
    stats: GradingStats | None,
    *,
    one_level: bool = False,
    ranges: Float[np.ndarray, "linears"] | None = None,
) -> dict[str, Any]:
    """Computes the fields of ``Statistics`` that depend on the model and on what it read.

    Args:
      model: Dense or graded model.
      stats: Grading statistics of the decode steps of one row, ``[steps, linears]``; None for a dense model
        or if nothing was decoded.
      one_level: Whether all channels are read at the same level, in an engine with many slots.
      ranges: ``calibrated_ranges(model)``; None fetches them, after the work that the device has.
    """
    names, others = linear_names(model.config), _bytes_beside_linears(model.config)

    def bytes_per_token(bits: Mapping[str, float]) -> float:
        weights = weights_read(model.config)
        return sum(count * bits[name] / 8 for name, count in weights.items()) + others

    fields: dict[str, Any] = {
        "realised_bits": None,
        "realised_bits_per_layer": {},
        "realised_bits_per_step": None,
        "activation_range_ratio": {},
        "bytes_per_token": None,
        "reading": "dense" if not model.graded else "one level" if one_level else "graded",
        "dense_dtype": None if model.graded else model.compute_dtype.name,
        "bytes_per_token_bf16": bytes_per_token(dict.fromkeys(names, 8 * BF16_BYTES)),
    }
    if not model.graded:
        fields["bytes_per_token"] = bytes_per_token({n: _kernel_bits(model, n) for n in names})
    elif stats is not None and len(stats.bits):
        means = np.asarray(stats.bits, np.float64).mean(axis=0)
        bits = dict(zip(names, means.tolist(), strict=True))
        ranges = calibrated_ranges(model) if ranges is None else ranges
        ratios = np.max(activation_range_ratio(stats, ranges), axis=0).tolist()
        fields |= {
            "realised_bits": weighted_mean(model, bits),
            "realised_bits_per_layer": bits,
            "realised_bits_per_step": np.asarray(stats.bits),
            "activation_range_ratio": dict(zip(names, ratios, strict=True)),
            "bytes_per_token": bytes_per_token({n: b + SCALE_BITS for n, b in bits.items()}),
        }
    return fields


def _kernel_bits(model: Decoder, name: str) -> int:
    """Returns the bits of a weight of a dense layer. Kernels of experts keep the dtype of the checkpoint.

    The output projection of a dense model is one layer, whatever the number of vocabulary blocks.
    """
    linear = model.lm_head.blocks[0] if in_head(name) else model.linear(name)
    assert isinstance(linear, DenseLinear | DenseExperts), "an unquantized model has dense layers"
    return 8 * linear.kernel[...].dtype.itemsize


def calibrated_ranges(model: Decoder) -> Float[np.ndarray, "linears"]:
    """Returns the largest ``|x|`` in calibration of each layer of a graded model, float32.

    Layers are in the order of ``decoder.linear_names``.
    """
    linears = [model.graded_linear(name) for name in linear_names(model.config)]
    return np.asarray(_stack([linear.max_activation[...] for linear in linears]))


def activation_range_ratio(
    stats: GradingStats, ranges: Float[np.ndarray, "linears"]
) -> Float[np.ndarray, "*steps linears"]:
    """Returns the largest ``|x|`` of each step and layer over the largest in calibration, float32.

    Args:
      stats: Grading statistics ``[*steps, linears]``.
      ranges: The largest ``|x|`` in calibration (see ``calibrated_ranges``).
    """
    # A model made for a test may have a largest activation of 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(stats.max_abs) / ranges


def weighted_mean(
    model: Decoder, bits: Mapping[str, float | Float[Array, "*any"]]
) -> float | Float[Array, "*any"]:
    """Averages the bits of linear layers, each weighted by the weights that it applies to a token.

    Args:
      model: The model of the layers.
      bits: Mean bits, or an array of them, by name of the linear layer. May leave layers out.
    """
    sizes = {name: weights for name, weights in weights_read(model.config).items() if name in bits}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _bytes_beside_linears(config: ModelConfig) -> float:
    """Returns the bytes that a token reads of routers, of ``vectors``, and of one row of the embedding."""
    sizes = axis_sizes(config)
    routers = sum(math.prod(router.shape(sizes)) for router in router_projections(config).values())
    return BF16_BYTES * (routers + config.hidden_size) + vector_bytes_read(config)


@jax.jit  # one transfer to the host and not one per layer
def _stack(scalars: list[Float[Array, ""]]) -> Float[Array, "linears"]:
    return jnp.stack(scalars)
