"""The dial: thresholds that make a text read the wanted mean bits, corrected while the text is read.

The thresholds of a layer are fixed numbers, so a token with larger activations reads more bits. For the same
reason a text unlike the calibration text reads up to 0.4 bits more or less than asked. The difference is
about the same at every setting, so the dial subtracts the mean difference observed so far. It observes the
end of the prompt first: the prompt is not graded, but ``engine.Preview`` shows the bits that grading would
read. Afterwards it observes every decoded token, and the next tokens make up for what the answer has read
beyond the wanted mean, so that short answers read the wanted mean, too.

All of this is arithmetic on a few numbers of each row, which the decode loop runs on the device after every
token. The result therefore does not depend on decode chunks, on the host, or on the other rows.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from grinqh_jax.decoding.bits import check_bits
from grinqh_jax.decoding.thresholds import StackedThresholds, interpolate, stacked_tables
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.weight_counts import weights_read

PRIOR_TOKENS = 16
"""Number of tokens without excess that the mean excess includes, because a few observed tokens say little."""

REPAYMENT_TOKENS = 8
"""Least number of tokens over which the dial repays the bits that an answer read beyond the wanted mean."""

FAST_TOKENS = 12
"""Number of decoded tokens that do not count towards the repayment.

The debt of an answer of up to 20 tokens is repaid over ``REPAYMENT_TOKENS`` tokens, and the debt of a longer
one over as many tokens as the answer has, less these. A setting that reacts quickly costs quality: the longer
the answer, the more tokens are left for the repayment.
"""

UNITS_PER_BIT = 1 << 24
"""Units for each bit in sums over layers. The sums are integers, because a sum of floats could depend on the
number of rows: a GPU may add floats in another order."""

PREVIEW_UNITS = 1 << 14
"""Units for each bit in sums over the tokens of a preview. These sums, below 2^10 bits, are exact in float32,
so the order of additions does not matter."""

SKIPPED_POSITIONS = 4
"""Number of leading positions of a text that do not add to the excess.

Attention heads with nothing to attend to attend to the first tokens of a text, whose activations are
therefore unlike all others: a few channels are hundreds of times larger than usual, the rest are small. In
decoding these tokens occur once in a conversation, and nearly always in the prompt, which is not graded.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DialState:
    """State of the dial of each row. Rows are independent of each other.

    The first axis of both arrays is the row, so indexing them reads or replaces the state of one row. To undo
    steps, use an earlier state.

    Attributes:
      wanted: float32 ``[B]``, wanted mean bits.
      sums: float32 ``[B, 4]``: ``excess``, ``tokens``, ``debt`` and ``decoded``. They share one array, so
        that XLA updates them in one kernel. Counts are exact up to 2^24 tokens.
    """

    wanted: Float[Array, "b"]
    sums: Float[Array, "b 4"]

    @classmethod
    def create(cls, bits: Float[Array | np.ndarray, "b"] | Sequence[float]) -> "DialState":
        """Returns the state before the first token; ``bits`` are the wanted mean bits of each row."""
        wanted = jnp.asarray(bits, jnp.float32)
        return cls(wanted, jnp.zeros((*wanted.shape, 4), jnp.float32))

    @property
    def excess(self) -> Float[Array, "b"]:
        """Bits that the observed tokens read beyond their settings, summed."""
        return self.sums[:, 0]

    @property
    def tokens(self) -> Float[Array, "b"]:
        """Number of tokens in ``excess``."""
        return self.sums[:, 1]

    @property
    def debt(self) -> Float[Array, "b"]:
        """Bits that the decoded tokens of the answer read beyond ``wanted``, summed."""
        return self.sums[:, 2]

    @property
    def decoded(self) -> Float[Array, "b"]:
        """Number of tokens in ``debt``."""
        return self.sums[:, 3]

    def plus(
        self,
        excess: Float[Array, "b"],
        tokens: Shaped[Array, "b"],
        debt: Shaped[Array, "b"] | None = None,
        decoded: Shaped[Array, "b"] | None = None,
    ) -> "DialState":
        """Returns the state with values (numbers or booleans) added to the sums, by default zeros."""
        zeros = jnp.zeros_like(self.wanted)
        added = (zeros if values is None else values for values in (excess, tokens, debt, decoded))
        sums = jnp.stack([values.astype(jnp.float32) for values in added], axis=-1)
        return dataclasses.replace(self, sums=self.sums + sums)

    def next_answer(self) -> "DialState":
        """Returns a state with the same excess, and no decoded tokens."""
        return dataclasses.replace(self, sums=self.sums.at[:, 2:].set(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dial:
    """The dial of each row of a batch: a pytree, which the functions of ``engine`` take and return.

    Attributes:
      tables: float32 ``[T, linears, P]``, thresholds at each target (see ``thresholds.stacked_tables``).
      targets: float32 ``[T]``, mean bits of the rows of ``tables``.
      shares: float32 ``[linears]`` (see ``layer_shares``).
      state: State of each row.
      names: Names of the linear layers.
      held: Whether decoded tokens leave the setting as it is. It is then that of the end of the prompt.
      least_repayment: Least number of tokens over which a debt is repaid.
    """

    tables: Float[Array, "t linears p"]
    targets: Float[Array, "t"]
    shares: Float[Array, "linears"]
    state: DialState
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    held: bool = dataclasses.field(default=False, metadata={"static": True})
    least_repayment: int = dataclasses.field(default=REPAYMENT_TOKENS, metadata={"static": True})

    @classmethod
    def create(
        cls, model: Decoder, targets: Sequence[float], bits: Float[np.ndarray, "b"] | Sequence[float]
    ) -> "Dial":
        """Returns a dial that has observed nothing.

        Args:
          model: Graded model.
          targets: Mean bits of the rows of its threshold tables.
          bits: Wanted mean bits of each row.

        Raises:
          UsageError: ``bits`` is outside the range of the targets.
        """
        for wanted in bits:
            check_bits(wanted, targets)
        return cls(
            tables=stacked_tables(model),
            targets=jnp.asarray(targets, jnp.float32),
            shares=jnp.asarray(layer_shares(model.config), jnp.float32),
            state=DialState.create(bits),
            names=tuple(linear_names(model.config)),
        )

    def with_state(self, state: DialState) -> "Dial":
        """Returns the same dial with another state."""
        return dataclasses.replace(self, state=state)

    # The methods are jitted, so that a caller outside the decode loop dispatches one program.
    @property
    @jax.jit
    def setting(self) -> Float[Array, "b"]:
        """Mean bits that the thresholds are interpolated for, within the range of the targets.

        This is ``wanted``, minus the mean excess over the observed tokens and ``PRIOR_TOKENS`` tokens without
        excess, minus the share of the debt that the next token pays back.
        """
        state = self.state
        repayment = jnp.maximum(state.decoded - FAST_TOKENS, self.least_repayment)
        setting = state.wanted - state.excess / (state.tokens + PRIOR_TOKENS) - state.debt / repayment
        return jnp.clip(setting, self.targets[0], self.targets[-1])

    @property
    @jax.jit
    def thresholds(self) -> StackedThresholds:
        """Thresholds of every linear layer and row at the setting. A new setting compiles nothing."""
        return StackedThresholds(interpolate(self.tables, self.targets, self.setting), self.names)

    @jax.jit
    def observe(self, bits: Float[Array, "b s linears"], counts: Int[Array, "b"]) -> "Dial":
        """Returns the dial after tokens that do not belong to an answer: a preview, or a window of a text.

        These tokens change the excess and not the debt.

        Args:
          bits: Bits that every token and linear layer read at the current setting, layers in the order of
            ``decoder.linear_names``.
          counts: Number of leading tokens of each row that are valid.
        """
        excess = self.mean_bits(bits) - self.setting[:, None]
        excess = jnp.round(excess * PREVIEW_UNITS) / PREVIEW_UNITS
        excess = jnp.sum(excess, axis=1, where=jnp.arange(bits.shape[1]) < counts[:, None])
        return self.with_state(self.state.plus(excess, counts))

    @jax.jit
    @jax.named_scope("dial")
    def follow(
        self, bits: Float[Array, "b linears"], active: Bool[Array, "b"], positions: Int[Array, "b"]
    ) -> "Dial":
        """Returns the dial after one decode step.

        Args:
          bits: Bits that every linear layer read at the current setting.
          active: Rows that decoded a token; the others stay as they are.
          positions: Position of the token in its text.
        """
        if self.held:
            return self
        return self.with_state(self.plus_tokens(self.state, bits, active, positions))

    def plus_tokens(
        self,
        state: DialState,
        bits: Float[Array, "b linears"],
        active: Bool[Array, "b"],
        positions: Int[Array, "b"],
    ) -> DialState:
        """Returns another state with the sums of tokens that were read at the setting of this dial.

        Args:
          state: State to add to.
          bits, active, positions: See ``follow``.
        """
        return self.plus_means(state, self.mean_bits(bits), active, positions)

    def plus_means(
        self,
        state: DialState,
        read: Float[Array, "b"],
        active: Bool[Array, "b"],
        positions: Int[Array, "b"],
    ) -> DialState:
        """Does what ``plus_tokens`` does, for the ``mean_bits`` of the tokens."""
        observed = active & (positions >= SKIPPED_POSITIONS)
        return state.plus(
            excess=jnp.where(observed, read - self.setting, 0),
            tokens=observed,
            debt=jnp.where(active, read - self.state.wanted, 0),
            decoded=active,
        )

    def mean_bits(self, bits: Float[Array, "*rows linears"]) -> Float[Array, "*rows"]:
        """Returns the mean over the weights of all layers, independent of the order of additions."""
        units = jnp.round(bits * (self.shares * UNITS_PER_BIT)).astype(jnp.int32)
        return jnp.sum(units, axis=-1, dtype=jnp.int32) / jnp.float32(UNITS_PER_BIT)


def layer_shares(config: ModelConfig) -> Float[np.ndarray, "linears"]:
    """Returns the share of each linear layer in the weights that a token reads, as in ``linear_names``."""
    sizes = np.array(list(weights_read(config).values()), np.float64)
    return sizes / sizes.sum()
