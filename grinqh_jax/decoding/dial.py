"""The dial in use: thresholds for a wanted mean of bits, kept true to the text that is being read.

Thresholds are fixed numbers for a layer, so a token with larger activations gets more bits. The same makes
a text that is unlike the calibration text read more, or less, than asked, by 0.4 bits at times. A text
differs by about as much at every setting, so the dial is set off by the difference seen so far: first in the
prompt, which is not graded but shows what grading would take (``engine.Preview``), then every few tokens.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from grinqh_jax.decoding.engine import Thresholds
from grinqh_jax.decoding.thresholds import stacked_tables, thresholds_at
from grinqh_jax.errors import UsageError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names, linear_shapes

PRIOR_TOKENS = 16
"""A text counts as calibration text for so many tokens more than were seen: few tokens say little."""


class Dial:
    """The settings of the rows of a batch, which are independent of one another.

    Args:
      model: graded.
      targets: of its threshold tables.
      bits: float ``[rows]``, the mean that each row is to read.

    Raises:
      UsageError: ``bits`` are out of the targets' range.
    """

    def __init__(self, model: Decoder, targets: Sequence[float], bits: Float[np.ndarray, "rows"]):
        for setting in bits:
            check_bits(setting, targets)
        self._names = linear_names(model.config)
        self._tables = stacked_tables(model)
        self._targets = jnp.asarray(targets, jnp.float32)
        self._range = targets[0], targets[-1]
        self._wanted = np.asarray(bits, np.float64)
        self._excess = np.zeros_like(self._wanted)  # of all tokens so far, in bits
        self._tokens = np.zeros_like(self._wanted)
        self._shares = layer_shares(model.config)

    @property
    def setting(self) -> Float[np.ndarray, "rows"]:
        """Where the dial stands: what is wanted, less the text's excess."""
        return np.clip(self._wanted - self._excess / (self._tokens + PRIOR_TOKENS), *self._range)

    @property
    def thresholds(self) -> Thresholds:
        """Of every linear layer and row, for the setting. A new setting compiles nothing."""
        return thresholds_at(self._names, self._tables, self._targets, jnp.asarray(self.setting, jnp.float32))

    def observe(
        self,
        bits: Float[Array, "rows steps linears"],
        counts: Integer[np.ndarray, "rows"],
        setting: Float[np.ndarray, "rows"] | None = None,
    ) -> None:
        """Takes into account what was read.

        Args:
          bits: of every token and linear layer, the latter as in ``decoder.linear_names``.
          counts: how many steps of each row count.
          setting: where the dial stood for them, by default where it stands now.
        """
        setting = self.setting if setting is None else setting
        counted = np.arange(bits.shape[1]) < np.asarray(counts)[:, None]
        read = np.sum(np.asarray(bits, np.float64) @ self._shares, axis=1, where=counted)
        self._excess = self._excess + read - counts * setting
        self._tokens = self._tokens + counts


def check_bits(bits: float, targets: Sequence[float]) -> None:
    """Raises UsageError where no dial of a model with these targets goes to ``bits``."""
    if not targets[0] <= bits <= targets[-1]:
        raise UsageError(
            f"bits {bits:g}: this checkpoint's dial goes from {targets[0]:g} to {targets[-1]:g}, or full"
        )


def layer_shares(config: ModelConfig) -> Float[np.ndarray, "linears"]:
    """Each linear layer's share of all their weights, in the order of ``decoder.linear_names``."""
    sizes = np.prod(list(linear_shapes(config).values()), axis=1, dtype=np.float64)
    return sizes / sizes.sum()
