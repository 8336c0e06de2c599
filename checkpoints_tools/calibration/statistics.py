"""Statistics of the inputs of each linear layer, and the pass over a layer that collects them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration import histogram
from grinqh_jax.decoding.dial import SKIPPED_POSITIONS
from grinqh_jax.model.apply import AnyLinear, Dense
from grinqh_jax.model.decoder_layer import DecoderLayer, RMSNorm


def first_scored_position(length: int) -> int:
    """Returns the first position of a window of ``length`` tokens that is counted; at least one is.

    The positions before it begin every window, but hardly ever occur in decoding (``SKIPPED_POSITIONS``).
    They count only for the range of activations.
    """
    return min(SKIPPED_POSITIONS, length - 1)


@dataclasses.dataclass
class LinearStatistics:
    """Statistics of the inputs of one linear layer. A quantizer may use any of them.

    All experts of a layer share them. An input counts once for each chosen expert, times its grading factor.

    Attributes:
      counts: Histogram of ``|x|`` over all channels and all scored positions, int64 ``[histogram.BINS]``.
      max_activation: Largest ``|x|`` over all positions.
    """

    counts: np.ndarray
    max_activation: float

    @classmethod
    def empty(cls) -> "LinearStatistics":
        """Returns the statistics of no input."""
        return cls(np.zeros(histogram.BINS, np.int64), 0.0)

    def add(self, seen: dict[str, jax.Array]) -> None:
        """Adds the result of ``observe`` for one batch."""
        self.counts += np.asarray(seen["counts"])
        self.max_activation = max(self.max_activation, float(seen["max"]))

    @property
    def finite(self) -> bool:
        """Whether all scored activations are finite."""
        # Not from the maximum, because XLA's maximum on a CPU drops NaN.
        return not self.counts[histogram.FINITE_BINS :].any()


def observe(x: Float[Array, "b t *experts k"]) -> dict[str, jax.Array]:
    """Computes the statistics of one batch of whole windows on the device."""
    return {
        "counts": histogram.count(x[:, first_scored_position(x.shape[1]) :]),
        "max": jnp.max(jnp.abs(x.astype(jnp.float32))),
    }


class Observed(Dense):
    """An ``apply`` strategy that runs every layer at full precision and observes its inputs.

    Attributes:
      seen: Result of ``observe``, by projection.
    """

    def __init__(self):
        self.seen: dict[str, dict[str, jax.Array]] = {}

    def product(self, name: str, linear: AnyLinear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        """See ``Dense``."""
        self.seen[name.rpartition(".")[2]] = observe(x)
        return super().product(name, linear, x)


# All layers share one compilation: they differ in nothing but their arrays.
@jax.jit
def _run_layer(layer: DecoderLayer, x: jax.Array):
    apply = Observed()
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return layer("layer", x, positions, apply)[0], apply.seen


@jax.jit
def _observe_normed(norm: RMSNorm, x: jax.Array):
    return observe(norm(x))


def through_layer(layer: DecoderLayer, hidden: Float[np.ndarray, "s t d"]) -> dict[str, LinearStatistics]:
    """Runs windows through a dense layer, one by one, and observes the inputs of its projections.

    Args:
      layer: Decoder layer with dense projections.
      hidden: Hidden states before the layer, in host memory; overwritten by the states after the layer.

    Returns:
      Statistics of each projection, by name.
    """
    statistics = {projection: LinearStatistics.empty() for projection in layer.spec.names}
    for window in hidden:
        x, seen = _run_layer(layer, window[None])
        window[...] = x[0]
        for projection in layer.spec.names:
            statistics[projection].add(seen[projection])
    return statistics


def of_head(norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]) -> LinearStatistics:
    """Observes the inputs of the output projection.

    Args:
      norm: Norm before the output projection.
      hidden: Hidden states after the last layer.
    """
    statistics = LinearStatistics.empty()
    for window in hidden:
        statistics.add(_observe_normed(norm, window[None]))
    return statistics
