"""The dial: thresholds that make a text read the wanted mean bits, corrected while the text is read.

The thresholds of a layer are fixed numbers, so a token with larger activations reads more bits. For the same
reason a text unlike the calibration text reads up to 0.4 bits more or less than asked. The difference is
about the same at every setting, so the dial subtracts the difference observed so far. It observes the prompt
first: the prompt is not graded, but ``engine.Preview`` shows the bits that grading would read. Afterwards it
observes every decode chunk.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from grinqh_jax.decoding.bits import check_bits
from grinqh_jax.decoding.engine import Thresholds
from grinqh_jax.decoding.thresholds import stacked_tables, thresholds_at
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names, linear_shapes

PRIOR_TOKENS = 16
"""Weight of the calibration text in the estimate, in tokens: a few observed tokens say little."""


class Dial:
    """The dial of each row of a batch. Rows are independent of each other.

    Args:
      model: Graded model.
      targets: Mean bits of the rows of its threshold tables.
      bits: float ``[rows]``, wanted mean bits of each row.

    Raises:
      UsageError: ``bits`` is outside the range of the targets.
    """

    def __init__(self, model: Decoder, targets: Sequence[float], bits: Float[np.ndarray, "rows"]):
        for wanted in bits:
            check_bits(wanted, targets)
        self._names = linear_names(model.config)
        self._tables = stacked_tables(model)
        self._targets = jnp.asarray(targets, jnp.float32)
        self._range = targets[0], targets[-1]
        self._wanted = np.asarray(bits, np.float64)
        self._excess = np.zeros_like(self._wanted)  # bits read beyond the setting, summed over tokens
        self._tokens = np.zeros_like(self._wanted)
        self._shares = layer_shares(model.config)

    @property
    def setting(self) -> Float[np.ndarray, "rows"]:
        """Mean bits that the thresholds are interpolated for: the wanted bits minus the estimated excess."""
        return np.clip(self._wanted - self._excess / (self._tokens + PRIOR_TOKENS), *self._range)

    @property
    def thresholds(self) -> Thresholds:
        """Thresholds of every linear layer and row at the setting. A new setting compiles nothing."""
        return thresholds_at(self._names, self._tables, self._targets, jnp.asarray(self.setting, jnp.float32))

    def observe(
        self,
        bits: Float[Array | np.ndarray, "rows steps linears"],
        counts: Integer[Array | np.ndarray, "rows"],
        setting: Float[np.ndarray, "rows"] | None = None,
    ) -> None:
        """Updates the setting from the bits that a text read.

        Args:
          bits: Bits of every token and linear layer, layers in the order of ``decoder.linear_names``.
          counts: Number of valid steps of each row.
          setting: Setting that the tokens were read at, by default the current one.
        """
        setting = self.setting if setting is None else setting
        counts = np.asarray(counts)
        counted = np.arange(bits.shape[1]) < counts[:, None]
        read = np.sum(np.asarray(bits, np.float64) @ self._shares, axis=1, where=counted)
        self._excess = self._excess + read - counts * setting
        self._tokens = self._tokens + counts


def layer_shares(config: ModelConfig) -> Float[np.ndarray, "linears"]:
    """Returns the share of each linear layer in all their weights, in the order of ``linear_names``."""
    sizes = np.prod(list(linear_shapes(config).values()), axis=1, dtype=np.float64)
    return sizes / sizes.sum()
