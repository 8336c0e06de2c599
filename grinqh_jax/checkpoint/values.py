"""Rules for the values in a checkpoint that, if broken, would give wrong logits without any error."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np


def value_problems(arrays: Mapping[str, np.ndarray | jax.Array]) -> list[str]:
    """Returns a message for each leaf whose values break a rule.

    Args:
      arrays: Leaves of a state tree (``decoder.abstract_tree``) by dotted name. Arrays of which this process
        holds only some shards are skipped.
    """
    complete = {n: a for n, a in arrays.items() if isinstance(a, np.ndarray) or a.is_fully_addressable}
    return [
        f"{name} {problem}"
        for name, array in complete.items()
        for problem in _leaf_problems(name.rpartition(".")[2], np.asarray(array))
    ]


def _leaf_problems(leaf: str, array: np.ndarray) -> Iterator[str]:
    # A wrong permutation would give each token the logit of another one.
    if leaf == "columns" and (lacking := np.setdiff1d(np.arange(array.size), array)).size:
        yield f"must hold each number from 0 to {array.size - 1} once, and lacks {lacking[0]}"
    # Descending thresholds would grade large activations with fewer bits than small ones, NaN with none.
    if leaf == "thresholds" and not (np.diff(array, axis=-1, prepend=0) >= 0).all():
        yield "must ascend from 0 or more along its last axis"
