"""Other ways to read a GRINQH checkpoint, which show the benefit of each component of grading.

Thresholds determine the bits that are read, so each way of reading is a threshold table for the same codes.
It needs no new weights, and is measured like any checkpoint. Truncation and skipping read the same mean bits
of every linear layer, the output projection included.

*Truncation* reads every channel at one level. It shows the nested code without grading.

*Skip and int4* uses two levels, 0 and 4 bits: the sparsity of TEAL (Liu et al., arXiv 2408.14690) on 4-bit
integers. For a mean of ``b`` bits a layer skips the share ``1 - b / 4`` of its activations that are smallest
on a calibration text.

*The whole head* reads all bits of the output projection, and the mean bits asked for of the decoder layers.
Fixed-precision quantizers leave the output projection in 16 bits, so this compares layers with layers.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Int32

from checkpoints_tools.calibration import histogram, statistics
from checkpoints_tools.calibration.allocation import least_within
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.errors import UsageError
from grinqh_jax.model.apply import Dense, in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from pallas_kernels.layout import DIGIT_BITS

INT4_LEVEL, INT4_BITS = 2, 4

NEVER = 1e30
"""Threshold that no activation reaches; finite, so that the dial can interpolate."""


def truncation(generator: Generator) -> Generator:
    """Returns the model with all channels read at one level, whose bits are the nearest to the dial."""
    planes = _planes(generator)
    level = np.clip(np.round(np.array(generator.targets) / DIGIT_BITS), 1, planes)
    table = np.where(np.arange(planes) < level[:, None], 0, NEVER)
    return _reread(generator, dict.fromkeys(linear_names(generator.model.config), table))


def skip_int4(generator: Generator, windows: Int32[np.ndarray, "s t"]) -> Generator:
    """Returns the model with every channel either skipped or read at 4 bits, and none skipped from 4 bits on.

    Args:
      generator: Generator of a GRINQH checkpoint.
      windows: Calibration tokens, in windows of one length.

    Raises:
      UsageError: The model is not a GRINQH checkpoint, or stores less than 4 bits.
    """
    planes = _planes(generator)
    if planes < INT4_LEVEL:
        raise UsageError(
            f"{generator.directory} stores {planes * DIGIT_BITS} bits per weight, skip-int4 reads "
            f"{INT4_BITS}; convert it with --max-bits 4 or more"
        )
    tables, targets = {}, _targets(generator)
    for name, counts in activation_counts(generator.model, windows).items():
        cut = skip_thresholds(counts, targets)[:, None]
        tables[name] = np.where(np.arange(planes) < INT4_LEVEL, cut, NEVER)
    return _reread(generator, tables)


def whole_head(generator: Generator) -> Generator:
    """Returns the model with all planes of the output projection read.

    Its dial and its ``targets`` are mean bits over all linear layers, which ``with_whole_head`` computes from
    the bits of the decoder layers.
    """
    planes = _planes(generator)
    config, most, targets = generator.model.config, planes * DIGIT_BITS, _targets(generator)
    everything = np.zeros((len(targets), planes))
    tables = {
        name: everything if in_head(name) else np.asarray(generator.model.graded_linear(name).thresholds[...])
        for name in linear_names(config)
    }
    return _reread(generator, tables, [with_whole_head(bits, config, most) for bits in targets])


def with_whole_head(bits: float, config: ModelConfig, max_bits: int) -> float:
    """Returns the mean over all linear layers if the decoder layers read ``bits`` and the head everything."""
    head = layer_shares(config)[[in_head(name) for name in linear_names(config)]].sum()
    return float((1 - head) * bits + head * max_bits)


def skip_thresholds(counts: Int[np.ndarray, "bins"], targets: Sequence[float]) -> Float[np.ndarray, "t"]:
    """Returns the magnitude that a share ``target / 4`` of the counted activations reaches, for each target.

    It is 0 for targets of 4 or more.

    Args:
      counts: Result of ``histogram.count``, not empty.
      targets: Mean bits, positive.
    """
    share = np.asarray(targets, np.float64) / INT4_BITS
    low, high = (np.full(len(share), np.log(limit)) for limit in (1e-30, NEVER))

    def reaching(log: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        return np.asarray(histogram.share_reaching(counts, np.exp(log)))

    return np.where(share >= 1, 0, np.exp(least_within(reaching, share, low, high)))


def activation_counts(model: Decoder, windows: Int32[np.ndarray, "s t"]) -> dict[str, np.ndarray]:
    """Returns histograms of the inputs of each linear layer at full precision, by name.

    Args:
      model: Dense or graded model.
      windows: Tokens; the model runs one window at a time.
    """
    total: dict[str, np.ndarray] = {}
    for window in windows:
        for name, counts in jax.device_get(_window_counts(model, window[None])).items():
            total[name] = total.get(name, 0) + counts.astype(np.int64)
    return total


@jax.jit
def _window_counts(model: Decoder, window: Int[jax.Array, "1 t"]) -> dict[str, jax.Array]:
    dense, counts = Dense(), {}

    def observe(name, linear, x):
        counts[name] = statistics.observe(x.array)["counts"]
        return dense(name, linear, x)

    model(window, observe)
    return counts


def _planes(generator: Generator) -> int:
    """Returns the number of stored planes. Raises UsageError if the model is not a GRINQH checkpoint."""
    if not generator.model.graded:
        raise UsageError(f"{generator.directory} is not a GRINQH checkpoint; convert it first")
    return generator.model.full_bits // DIGIT_BITS


def _targets(generator: Generator) -> Sequence[float]:
    assert generator.targets is not None, "a graded model has targets"
    return generator.targets


def _reread(
    generator: Generator,
    tables: Mapping[str, Float[np.ndarray, "t p"]],
    targets: Sequence[float] | None = None,
) -> Generator:
    """Returns the model with other threshold tables and targets. Weights and compiled programs are shared."""
    model = nnx.merge(*nnx.split(generator.model))
    for name, table in tables.items():
        model.graded_linear(name).thresholds = nnx.Param(jnp.asarray(table, jnp.float32))
    targets = generator.targets if targets is None else targets
    return Generator(model, generator.tokenizer, generator.defaults, targets, generator.directory)
