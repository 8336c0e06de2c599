"""Unstacks small arrays that functions receive as one stacked argument."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def unstacked(stack: Shaped[Array, "members *shape"]) -> list[Shaped[Array, "*shape"]]:
    """Returns the members of a stack, for traced functions; on a GPU this takes one or a few kernels.

    XLA (jax 0.11.2) makes one kernel, of a microsecond, for each bare slice, but fuses elementwise
    operations on the same operand. So this selects each slice by a condition that is always true and that XLA
    cannot simplify: the first number equals itself. If that number is NaN, all members become NaN.

    Args:
      stack: Stack of any dtype.
    """
    first = stack[(0,) * stack.ndim]
    return [jnp.where(first == first, stack[i], first) for i in range(stack.shape[0])]
