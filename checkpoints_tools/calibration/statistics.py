"""Statistics of the inputs of each linear layer, and the pass over a layer that collects them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from checkpoints_tools.calibration import histogram
from checkpoints_tools.source.passes import ALL_HELD, Observing, mixture_of, pass_windows
from grinqh_jax.decoding.dial import SKIPPED_POSITIONS
from grinqh_jax.model.apply import AnyLinear
from grinqh_jax.model.decoder_layer import DecoderLayer, RMSNorm
from grinqh_jax.model.experts import ChosenDense


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


def observe(
    x: Float[Array, "b t *experts k"], is_counted: Bool[Array, "b t *experts"] | None = None
) -> dict[str, jax.Array]:
    """Computes the statistics of one batch of whole windows on the device.

    Rows that are not counted must be zeros. By default all are counted.
    """
    first = first_scored_position(x.shape[1])
    return {
        "counts": histogram.count(x[:, first:], None if is_counted is None else is_counted[:, first:]),
        "max": jnp.max(jnp.abs(x.astype(jnp.float32))),
    }


class Observed(Observing):
    """An ``apply`` strategy that runs every layer at full precision and observes its inputs.

    Attributes:
      seen: Result of ``observe``, by projection.
    """

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        mixture = mixture_of(layer)
        self._second = None if mixture is None else mixture[0].writes.name

    def product(self, name: str, linear: AnyLinear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        """See ``Dense``."""
        projection, is_held = name.rpartition(".")[2], None
        # The first projection of a mixture has the inputs of all experts, also of those that are not held.
        if projection == self._second and isinstance(linear, ChosenDense):
            is_held = linear.is_held
        self.seen[projection] = observe(x, is_held)
        return super().product(name, linear, x)


@jax.jit
def _observe_normed(norm: RMSNorm, x: jax.Array):
    return observe(norm(x))


def through_layer(
    layer: DecoderLayer, hidden: Float[np.ndarray, "s t d"], groups: Iterable[Any] = ALL_HELD
) -> dict[str, LinearStatistics]:
    """Runs windows through a dense layer, one by one, and observes the inputs of its projections.

    Args:
      layer: Decoder layer with dense projections.
      hidden: Hidden states before the layer, in host memory; overwritten by the states after the layer.
      groups: See ``passes.pass_windows``.

    Returns:
      Statistics of each projection, by name.
    """
    statistics = {projection: LinearStatistics.empty() for projection in layer.spec.names}

    def add(seen: dict[str, dict[str, jax.Array]]) -> None:
        for projection, values in seen.items():
            statistics[projection].add(values)

    pass_windows(layer, hidden, groups, Observed, add)
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
