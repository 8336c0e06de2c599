"""Unstacks small arrays that a jitted function receives as one stacked argument."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def unstacked(stack: Shaped[Array, "members *shape"]) -> list[Shaped[Array, "*shape"]]:
    """Returns the members of a stack. In a traced function this compiles to one or a few GPU kernels.

    For each bare slice XLA (jax 0.11.2) launches a kernel, which takes a microsecond, but it fuses
    elementwise operations on the same operand. This function therefore selects each slice by a condition that
    is always true and that XLA cannot simplify: the first number equals itself. If that number is NaN, all
    members become NaN.

    Args:
      stack: Stack of any dtype.
    """
    first = stack[(0,) * stack.ndim]
    return [jnp.where(first == first, stack[i], first) for i in range(stack.shape[0])]
