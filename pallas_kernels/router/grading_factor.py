"""The factor of an expert's inputs while they are graded, for XLA and for lane programs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

_LEAST_PROBABILITY = 2.0**-16
_EXPONENT = 0x7F800000
"""Exponent bits of a float32: those of the largest power of two below it."""
_INVERSE = 0x7F000000
"""Sum of the bits of a power of two and of its inverse."""


def grading_factor(probabilities: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
    """Returns the factor of an expert's inputs while they are graded: its probability as a power of two.

    An error of an expert's outputs is multiplied by its probability. If the expert's inputs are multiplied by
    it before the product, and the outputs divided by it, then grading reads fewer bits of experts that matter
    less. A power of two makes both exact in every float dtype.
    """
    pattern = jax.lax.bitcast_convert_type(
        jnp.maximum(probabilities, _LEAST_PROBABILITY) * jnp.float32(2**0.5), jnp.uint32
    )
    return jax.lax.bitcast_convert_type(pattern & _EXPONENT, jnp.float32)


def inverse_grading_factor(isa: Instructions, probability: Value) -> Value:
    """Returns ``1 / grading_factor(probability)`` in a lane program, exactly."""
    least = isa.float_to_bits(isa.constant(_LEAST_PROBABILITY, "f32"))
    raised = isa.bits_to_float(isa.maximum(isa.float_to_bits(probability), least))
    pattern = isa.float_to_bits(raised * 2**0.5) & _EXPONENT
    return isa.bits_to_float(isa.constant(_INVERSE) - pattern)
