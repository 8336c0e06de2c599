"""What the values of a checkpoint must obey, beside their shapes and dtypes, for its answers to be right."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np


def value_problems(arrays: Mapping[str, np.ndarray | jax.Array]) -> list[str]:
    """Says which leaves hold what would give wrong logits without an error.

    Args:
      arrays: some leaves of a state tree (``decoder.abstract_tree``) by dotted name. Those that other
        processes hold in part are passed over.
    """
    whole = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray) or a.is_fully_addressable}
    return [
        f"{name} {problem}"
        for name, array in whole.items()
        for problem in _problems_of_leaf(name.rpartition(".")[2], array)
    ]


def _problems_of_leaf(leaf: str, array: np.ndarray | jax.Array) -> Iterator[str]:
    # Logits would be those of other tokens.
    if leaf == "columns" and (lacking := np.setdiff1d(np.arange(array.size), array)).size:
        yield f"must hold each number from 0 to {array.size - 1} once, and lacks {lacking[0]}"
    # Channels of large activations would be read with fewer bits than others, or with none for a NaN.
    if leaf == "thresholds" and not (np.diff(array, axis=-1, prepend=0) >= 0).all():
        yield "must ascend from 0 or more along its last axis"
