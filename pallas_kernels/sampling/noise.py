"""Gumbel noise in a lane program: the numbers that ``jax.random.gumbel`` makes of a folded key.

The random bits equal those of JAX (Threefry 2x32, partitionable, as is JAX's default) exactly, so a token
gets the same noise wherever it is computed. The two logarithms have a relative error of 2e-7, so the noise
differs from XLA's in the last bits.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
"""Rotations of the rounds of Threefry 2x32 (Salmon et al., SC 2011), in turns of four rounds."""

PARITY = 0x1BD11BDA
"""Constant of the key schedule of Threefry."""

TINY = 2.0**-126
"""Smallest uniform number, as in ``jax.random.gumbel``: the smallest normal float32."""

MAX_NOISE = 16.64
MIN_NOISE = -4.48
"""Bounds of the noise: the uniform numbers are ``TINY`` and multiples of 2**-23 below 1."""

LOG_COEFFICIENTS = (
    0.06746601313352585,
    -0.11675640940666199,
    0.11888174712657928,
    -0.12405591458082199,
    0.14219550788402557,
    -0.1666799634695053,
    0.2000211924314499,
    -0.25000008940696716,
    0.3333331346511841,
)
"""Coefficients of P, highest power first, in ``log(1 + f) = f - f**2 / 2 + f**3 P(f)`` for 1 + f between
sqrt(1/2) and sqrt(2): a fit of the least relative error of the logarithm, 1e-9."""

SQRT_HALF_BITS = 0x3F3504F3
"""Bits of the float32 nearest to sqrt(1/2)."""

ONE_BITS = 0x3F800000
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
"""The natural logarithm of 2 as a sum. Products of the first term with exponents are exact."""

Key = tuple[Value, Value]
"""The two words of a key of JAX's generator ``threefry2x32``."""


def row_key(isa: Instructions, seed: Value, position: Value) -> Key:
    """Returns the words of ``jax.random.fold_in(jax.random.key(seed), position)`` for uint32 arguments."""
    zero = isa.constant(0)
    return threefry(isa, (zero, seed), (zero, position))


def gumbel(isa: Instructions, key: Key, index: Value) -> Value:
    """Returns element ``index`` of ``jax.random.gumbel(key, [n])``, float32, for n up to 2**32."""
    high, low = threefry(isa, key, (isa.constant(0), index))
    mantissa = (high ^ low) >> 9
    uniform = isa.bits_to_float(mantissa | ONE_BITS) - 1.0
    uniform = isa.select(mantissa.equals(0), isa.constant(TINY, "f32"), uniform)
    return log(isa, log(isa, uniform) * -1.0) * -1.0


def threefry(isa: Instructions, key: Key, counter: Key) -> Key:
    """Encrypts a counter of two words (Threefry 2x32 with 20 rounds)."""
    schedule = *key, key[0] ^ key[1] ^ PARITY
    a, b = counter[0] + schedule[0], counter[1] + schedule[1]
    for turn in range(1, 6):
        for rotation in ROTATIONS[(turn - 1) % 2]:
            a = a + b
            b = ((b << rotation) | (b >> (32 - rotation))) ^ a
        a, b = a + schedule[turn % 3], b + schedule[(turn + 1) % 3] + turn
    return a, b


def log(isa: Instructions, x: Value) -> Value:
    """Returns the natural logarithm of a positive normal float32 with a relative error of 2e-7."""
    shifted = isa.float_to_bits(x) + (ONE_BITS - SQRT_HALF_BITS)
    exponent = isa.int_to_float((shifted >> 23) - 127)
    f = isa.bits_to_float((shifted & 0x7FFFFF) + SQRT_HALF_BITS) - 1.0
    polynomial = isa.constant(LOG_COEFFICIENTS[0], "f32")
    for coefficient in LOG_COEFFICIENTS[1:]:
        polynomial = isa.multiply_add(polynomial, f, isa.constant(coefficient, "f32"))
    square = f * f
    rest = isa.multiply_add(exponent, isa.constant(LN2_LOW, "f32"), square * f * polynomial)
    rest = isa.multiply_add(square, isa.constant(-0.5, "f32"), rest)
    return isa.multiply_add(exponent, isa.constant(LN2_HIGH, "f32"), f + rest)
