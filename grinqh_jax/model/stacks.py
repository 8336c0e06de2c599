"""Many small arrays as one, for functions that are called with them again and again."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def unstacked(stack: Shaped[Array, "members *shape"]) -> list[Shaped[Array, "*shape"]]:
    """The members of a stack, for a traced function; on a GPU one kernel, or a few, slice them all off.

    XLA makes a kernel of each bare slice, a microsecond each, but one of elementwise operations on the same
    operand. So this is a selection, by a truth that XLA does not know: the first number equals itself. (If it
    is NaN all members become NaN.)

    Args:
      stack: of any dtype.
    """
    first = stack[(0,) * stack.ndim]
    return [jnp.where(first == first, stack[i], first) for i in range(stack.shape[0])]
