"""The dial of speculation: it follows the tokens of an answer in blocks.

All positions of a verification are read at one setting, before the bits of the first are known. If the dial
followed every verification, the text would depend on the number of drafts, and so on load. It therefore
changes its setting only after every ``BLOCK`` tokens of the answer, and a verification does not go beyond the
end of a block. With and without drafts, the text is then the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.decoding.dial import Dial, DialState

BLOCK = 16
"""Number of tokens of an answer that are read at one setting. A debt is repaid over at least as many."""


def in_blocks(dial: Dial) -> Dial:
    """Returns the dial with repayments that suit blocks. A shorter one would repay a debt more than once."""
    return dataclasses.replace(dial, least_repayment=max(dial.least_repayment, BLOCK))


def left_in_block(dial: Dial | None, pending: Float[Array, "b 4"]) -> Int[Array, "b"] | None:
    """Returns the number of tokens up to the end of the block of each text; None for no end.

    Args:
      dial: The dial; None for a dense model.
      pending: Sums of the tokens of the block so far, as in ``DialState``.
    """
    if dial is None or dial.held:
        return None
    return BLOCK - pending[:, 3].astype(jnp.int32)


@jax.named_scope("dial")
def follow(
    dial: Dial,
    pending: Float[Array, "b 4"],
    bits: Float[Array, "b t linears"],
    produced: Bool[Array, "b t"],
    positions: Int[Array, "b t"],
) -> tuple[Dial, Float[Array, "b 4"]]:
    """Returns the dial and the sums of the block after a verification.

    Args:
      dial: Dial before it.
      pending: See ``left_in_block``.
      bits: Bits that every position and linear layer read.
      produced: Positions that belong to the text.
      positions: Position of each token in its text.
    """
    if dial.held:
        return dial, pending
    block, read = DialState(dial.state.wanted, pending), dial.mean_bits(bits)
    # One by one, so that the sums do not depend on how the tokens were divided among verifications.
    for i in range(bits.shape[1]):
        block = dial.plus_means(block, read[:, i], produced[:, i], positions[:, i])
    full = (block.decoded >= BLOCK)[:, None]
    state = dataclasses.replace(dial.state, sums=dial.state.sums + jnp.where(full, block.sums, 0))
    return dial.with_state(state), jnp.where(full, 0, block.sums)
