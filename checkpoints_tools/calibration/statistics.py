"""What calibration keeps of the inputs of each linear layer, and the pass that collects it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration import histogram
from grinqh_jax.decoding.engine import SKIPPED_POSITIONS
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import LAYER_LINEARS, DecoderLayer, RMSNorm
from grinqh_jax.model.linear import Linear


def first_scored_position(length: int) -> int:
    """The first position of a window of ``length`` tokens that is counted: there is always one.

    Those before it would occur in every window here, and in decoding hardly ever (``SKIPPED_POSITIONS``).
    They do belong to the range of what a model's activations can be.
    """
    return min(SKIPPED_POSITIONS, length - 1)


@dataclasses.dataclass
class LinearStatistics:
    """What is known about the inputs of one linear layer; a quantizer may use any of it.

    Attributes:
      counts: int64 ``[histogram.BINS]``, the histogram of ``|x|`` over all channels, and all tokens but the
        first few of each window.
      max_activation: the largest ``|x|`` of all tokens.
    """

    counts: np.ndarray
    max_activation: float

    @classmethod
    def empty(cls) -> "LinearStatistics":
        """Of no input yet."""
        return cls(np.zeros(histogram.BINS, np.int64), 0.0)

    def add(self, seen: dict[str, jax.Array]) -> None:
        """Adds what ``observe`` has seen on one batch."""
        self.counts += np.asarray(seen["counts"])
        self.max_activation = max(self.max_activation, float(seen["max"]))

    @property
    def finite(self) -> bool:
        """Whether all activations were. (Not asked of the maximum: XLA's on a CPU loses NaN.)"""
        return not self.counts[histogram.FINITE_BINS :].any()


def observe(x: Float[Array, "b t k"]) -> dict[str, jax.Array]:
    """The statistics of one batch of whole windows, on the device."""
    return {
        "counts": histogram.count(x[:, first_scored_position(x.shape[1]) :]),
        "max": jnp.max(jnp.abs(x.astype(jnp.float32))),
    }


class Observed(Dense):
    """An ``apply`` strategy: every layer at full precision, its inputs observed (``seen``, by part)."""

    def __init__(self):
        self.seen: dict[str, dict[str, jax.Array]] = {}

    def product(self, name: str, linear: Linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        self.seen[name.rpartition(".")[2]] = observe(x)
        return super().product(name, linear, x)


# One compilation serves all layers: they differ in nothing but their arrays.
@jax.jit
def _run_layer(layer: DecoderLayer, x: jax.Array):
    apply = Observed()
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return layer("layer", x, positions, apply)[0], apply.seen


@jax.jit
def _run_norm(norm: RMSNorm, x: jax.Array):
    return observe(norm(x))


def through_layer(layer: DecoderLayer, hidden: Float[np.ndarray, "s t d"]) -> dict[str, LinearStatistics]:
    """Runs windows through a dense layer, one at a time, and observes the inputs of its linear layers.

    Args:
      layer: with dense linear layers.
      hidden: hidden states before the layer, in host memory; replaced by those behind it.

    Returns:
      Statistics of ``qkv``, ``o``, ``gate_up`` and ``down``.
    """
    statistics = {part: LinearStatistics.empty() for part in LAYER_LINEARS}
    for window in hidden:
        x, seen = _run_layer(layer, window[None])
        window[...] = x[0]
        for part in LAYER_LINEARS:
            statistics[part].add(seen[part])
    return statistics


def of_head(norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]) -> LinearStatistics:
    """Observes the inputs of the output projection: the hidden states behind the last layer, normed."""
    statistics = LinearStatistics.empty()
    for window in hidden:
        statistics.add(_run_norm(norm, window[None]))
    return statistics
