"""Which tokens go into which block of the output projection (``grinqh_jax.model.output_projection``)."""

import numpy as np
from jaxtyping import Float, Int, Int32

from grinqh_jax.model.output_projection import block_sizes

UNSEEN = 0.15
"""The share of all sensitivity that is spread evenly over the vocabulary. Tokens that the calibration text
never comes near would count for nothing, and another text has other tokens."""


def smooth_sensitivities(sensitivities: Float[np.ndarray, "v"]) -> Float[np.ndarray, "v"]:
    """Sensitivities of the tokens' logits, those on the calibration text brought closer to their mean."""
    return (1 - UNSEEN) * sensitivities + UNSEEN * sensitivities.mean()


def token_blocks(sensitivities: Float[np.ndarray, "v"]) -> list[Int[np.ndarray, "tokens"]]:
    """The tokens of each block, ascending: the first block has those that predictions depend on most."""
    order = np.argsort(-sensitivities, kind="stable")
    ends = np.cumsum(block_sizes(len(sensitivities)))
    return [np.sort(tokens) for tokens in np.split(order, ends[:-1])]


def token_columns(blocks: list[Int[np.ndarray, "tokens"]]) -> Int32[np.ndarray, "v"]:
    """Where each token is among the outputs of all blocks."""
    return np.argsort(np.concatenate(blocks)).astype(np.int32)
