"""A graded linear layer as 8-bit codes in logical order, for the converter's many graded products.

The planes of a checkpoint suit a decode step, which unpacks them on the GPU. For products with many rows the
converter keeps one byte for each weight instead. This takes the same memory, and a level is read by a shift
and a multiplication.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8

from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import NestedWeight, codes, grading, layout

FINE_LEVEL = 3
"""First level that the converter reads with all stored digits, which saves a product for each linear layer.
The squared error of this level (6 bits) is 16 times less than that of level 2 and 256 times less than that of
level 1, which every setting of the dial below 5 bits mixes with it."""


class CodedLinear(nnx.Module):
    """A graded linear layer.

    Attributes:
      codes: uint8 ``[in_features, out_features]``; the digits that are not stored are 0.
      scales: float16 ``[ceil(in_features / 128), out_features]``.
      thresholds: float32 ``[T, P]``, see ``GradedLinear``.
      bias: float32 ``[out_features]`` that is added to the outputs, or None.
    """

    def __init__(
        self,
        codes: UInt8[Array, "k n"],
        scales: Float16[Array, "g n"],
        thresholds: Float[Array, "t p"],
        bias: Float[Array, "n"] | None = None,
    ):
        self.codes, self.scales, self.thresholds = map(nnx.Param, (codes, scales, thresholds))
        self.bias = None if bias is None else nnx.Param(bias)
        self.num_planes = thresholds.shape[1]
        self.in_features, self.out_features = codes.shape

    @classmethod
    def of_planes(cls, linear: GradedLinear) -> "CodedLinear":
        """Returns the codes of a layer that is stored in planes; its level gains are left out."""
        stored, scales = logical_codes(linear.weight)
        return cls(stored, scales, linear.thresholds[...], None if linear.bias is None else linear.bias[...])

    def select(self, start: int, stop: int) -> "CodedLinear":
        """Returns a range of outputs."""
        outputs = slice(start, stop)
        codes, scales = (parameter[...][:, outputs] for parameter in (self.codes, self.scales))
        bias = None if self.bias is None else self.bias[...][outputs]
        return CodedLinear(codes, scales, self.thresholds[...], bias)

    def graded(
        self,
        x: Float[Array, "*rows k"],
        thresholds: Float[Array, "*#rows p"],
        level_gains: Float[Array, "p"],
        outputs: Float[Array, "*rows n"] | None = None,
    ) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias`` with each channel read at its level, float32.

        The result is differentiable with respect to ``x`` and ``level_gains``, with levels as constants.
        Levels from ``FINE_LEVEL`` on read the same weights, each with its gain.

        Args:
          x: Activations, any number of rows.
          thresholds: Thresholds of levels ``1..P``, for all rows or for each.
          level_gains: Factors of levels ``1..P``.
          outputs: The result of an earlier call. It is returned as it is, and only a gradient needs products.
        """
        scaled, level = graded_inputs(x, thresholds, level_gains)
        y = _product(self.num_planes, self.codes[...], self.scales[...], scaled, level, outputs)
        return y if self.bias is None or outputs is not None else y + self.bias[...]


def graded_inputs(
    x: Float[Array, "*rows k"], thresholds: Float[Array, "*#rows p"], level_gains: Float[Array, "p"]
) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """Returns the activations times the gains of their levels, and the levels."""
    level = grading.levels(x, thresholds)
    # Not a gather: its gradient would be a scatter into P numbers, which is slow.
    gain = level_gains[0]
    for index in range(1, len(level_gains)):
        gain = jnp.where(level > index, level_gains[index], gain)
    return (x * gain).astype(x.dtype), level


def level_weights(
    stored: UInt8[Array, "k n"], scales: Float16[Array, "g n"], level: int, dtype
) -> Float[Array, "k n"]:
    """Returns the weights of a level from 1 on, computed in float32 (see ``NestedWeight``).

    Args:
      stored: Codes.
      scales: Their scales.
      level: Level.
      dtype: Dtype of the result.
    """
    digits = (stored >> (8 - layout.DIGIT_BITS * level)).astype(jnp.float32)
    values = digits * 4.0 ** (1 - level) + (0.5 * 4.0 ** (1 - level) - codes.RANGE)
    scale = jnp.repeat(scales.astype(jnp.float32), layout.GROUP, axis=0)[: len(stored)]
    return (values * scale).astype(dtype)


def _products(num_planes: int) -> list[tuple[int, int]]:
    """Returns ``(first level, level whose weights are read)`` of each product."""
    last = min(FINE_LEVEL, num_planes)
    return [(level, level) for level in range(1, last)] + [(last, num_planes)]


def _is_read(level: Int[Array, "*rows k"], first: int, num_planes: int) -> Bool[Array, "*rows k"]:
    """Returns which channels are read by the product with first level ``first`` (see ``_products``)."""
    return level >= first if first == min(FINE_LEVEL, num_planes) else level == first


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(num_planes, stored, scales, scaled, level, outputs):
    """Returns ``CodedLinear.graded`` without bias. ``scaled`` holds the activations times their gains."""
    return product(num_planes, stored, scales, scaled, level) if outputs is None else outputs


def product(
    num_planes: int,
    stored: UInt8[Array, "k n"],
    scales: Float16[Array, "g n"],
    scaled: Float[Array, "*rows k"],
    level: Int[Array, "*rows k"],
) -> Float[Array, "*rows n"]:
    """Returns the product of the result of ``graded_inputs`` with codes, float32."""
    total = jnp.zeros((), jnp.float32)
    for first, read_level in _products(num_planes):
        inputs = jnp.where(_is_read(level, first, num_planes), scaled, 0)
        kernel = level_weights(stored, scales, read_level, scaled.dtype)
        total += jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)
    return total


def _product_forward(num_planes, stored, scales, scaled, level, outputs):
    # The residuals must be a pytree, so an empty array carries the dtype.
    residuals = stored, scales, level, jnp.zeros(0, scaled.dtype)
    return _product(num_planes, stored, scales, scaled, level, outputs), residuals


def _product_backward(num_planes, residuals, gradient):
    stored, scales, level, like = residuals
    back = inputs_gradient(num_planes, stored, scales, gradient.astype(like.dtype), level)
    return None, None, back, None, None


def inputs_gradient(
    num_planes: int,
    stored: UInt8[Array, "k n"],
    scales: Float16[Array, "g n"],
    gradient: Float[Array, "*rows n"],
    level: Int[Array, "*rows k"],
) -> Float[Array, "*rows k"]:
    """Returns the gradient at the scaled inputs of ``product``, in the dtype of that at its result."""
    total = jnp.zeros((), gradient.dtype)
    for first, read_level in _products(num_planes):
        kernel = level_weights(stored, scales, read_level, gradient.dtype)
        total = jnp.where(_is_read(level, first, num_planes), jnp.matmul(gradient, kernel.T), total)
    return jnp.where(level > 0, total, 0)


_product.defvjp(_product_forward, _product_backward)


@jax.jit
def logical_codes(weight: NestedWeight) -> tuple[UInt8[Array, "k n"], Float16[Array, "g n"]]:
    """Returns codes and scales of a weight in logical order, without padding."""
    digits = codes.unpack(weight.planes)[:, : weight.in_features, : weight.out_features]
    shifts = range(8 - layout.DIGIT_BITS, -1, -layout.DIGIT_BITS)
    stored = sum(digit << shift for digit, shift in zip(digits, shifts, strict=False))
    return jnp.asarray(stored, jnp.uint8), weight.scales[:, : weight.out_features]
