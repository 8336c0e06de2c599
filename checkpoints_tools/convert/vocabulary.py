"""Assigns tokens to the vocabulary blocks (see ``grinqh_jax.model.output_projection``)."""

import numpy as np
from jaxtyping import Float, Int, Int32

from grinqh_jax.model.output_projection import block_sizes

UNSEEN = 0.15
"""Share of the total sensitivity that is spread uniformly over the vocabulary. Without it, tokens that are
never probable in the calibration text would get no bits, but they may be probable in another text."""


def smooth_sensitivities(sensitivities: Float[np.ndarray, "v"]) -> Float[np.ndarray, "v"]:
    """Moves the sensitivities of the logits towards their mean by the share ``UNSEEN``."""
    return (1 - UNSEEN) * sensitivities + UNSEEN * sensitivities.mean()


def token_blocks(sensitivities: Float[np.ndarray, "v"]) -> list[Int[np.ndarray, "_"]]:
    """Returns the tokens of each vocabulary block, ascending; the first block has the most sensitive ones."""
    order = np.argsort(-sensitivities, kind="stable")
    ends = np.cumsum(block_sizes(len(sensitivities)))
    return [np.sort(tokens) for tokens in np.split(order, ends[:-1])]


def token_to_output(blocks: list[Int[np.ndarray, "_"]]) -> Int32[np.ndarray, "v"]:
    """Returns, for each token, the index of its logit among the outputs of all vocabulary blocks."""
    return np.argsort(np.concatenate(blocks)).astype(np.int32)
