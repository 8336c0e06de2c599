"""Graded experts as 8-bit codes in logical order (see ``coded_linear``)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float16, Int, UInt8

from checkpoints_tools.convert.coded_linear import (
    graded_inputs,
    inputs_gradient,
    logical_codes,
    product,
)
from checkpoints_tools.source.layer import put_expert
from grinqh_jax.model.experts import GradedExperts, RowBias, bias_of
from pallas_kernels.experts.blocks import map_blocks


class CodedExperts(nnx.Module):
    """The graded linear layers of experts.

    Attributes:
      codes: uint8 ``[experts, in_features, out_features]``; the digits that are not stored are 0.
      scales: float16 ``[experts, ceil(in_features / 128), out_features]``.
      thresholds: float32 ``[T, P]``, see ``GradedExperts``.
      bias: float32 ``[experts, out_features]`` that is added to the outputs, or None.
    """

    def __init__(
        self,
        codes: UInt8[Array, "e k n"],
        scales: Float16[Array, "e g n"],
        thresholds: Float[Array, "t p"],
        bias: Float[Array, "e n"] | None = None,
    ):
        self.codes, self.scales, self.thresholds = map(nnx.Param, (codes, scales, thresholds))
        self.bias = None if bias is None else nnx.Param(bias)
        _, self.in_features, self.out_features = codes.shape

    @classmethod
    def of_planes(cls, experts: GradedExperts) -> "CodedExperts":
        """Returns the codes of experts that are stored in planes; their level gains are left out."""
        weight, stacks = experts.weight, None
        for expert in range(weight.num_experts):
            stored = logical_codes(weight.expert(expert))
            if stacks is None:
                stacks = [jnp.zeros((weight.num_experts, *one.shape), one.dtype) for one in stored]
            stacks = [put_expert(stack, one, expert) for stack, one in zip(stacks, stored, strict=True)]
            jax.block_until_ready(stacks)  # The codes of few experts wait to be copied.
        assert stacks is not None, "a mixture has experts"
        bias = None if experts.bias is None else experts.bias[...]
        codes, scales = stacks
        return cls(codes, scales, experts.thresholds[...], bias)

    def choose(self, experts: Int[Array, "*rows"], factors: Float[Array, "*rows"]) -> "ChosenCoded":
        """Returns the linear layers of the experts of each row, whose inputs are times ``factors``."""
        arrays = self.codes[...], self.scales[...], self.thresholds[...]
        return ChosenCoded(*arrays, experts, bias_of(self, experts, factors))


class ChosenCoded(NamedTuple):
    """A linear layer of another expert for each row; has the methods of ``CodedLinear``.

    Attributes:
      codes, scales, thresholds: See ``CodedExperts``.
      experts: Expert of each row.
      bias: See ``grinqh_jax.model.experts.bias_of``.
    """

    codes: UInt8[Array, "e k n"]
    scales: Float16[Array, "e g n"]
    thresholds: Float[Array, "t p"]
    experts: Int[Array, "s t c"]
    bias: RowBias = None

    def graded(
        self,
        x: Float[Array, "s t c k"],
        thresholds: Float[Array, "*#tokens p"],
        level_gains: Float[Array, "p"],
        outputs: Float[Array, "s t c n"] | None = None,
    ) -> Float[Array, "s t c n"]:
        """Returns what ``CodedLinear.graded`` does. ``thresholds`` are those of each token, or of all."""
        if thresholds.ndim > 1:
            thresholds = thresholds[..., None, :]
        scaled, level = graded_inputs(x, thresholds, level_gains)
        rows = [array.reshape(-1, array.shape[-1]) for array in (scaled, level)]
        computed = None if outputs is None else outputs.reshape(-1, outputs.shape[-1])
        arguments = self.codes, self.scales, self.experts.reshape(-1), *rows, computed
        y = _product(self.thresholds.shape[1], *arguments)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None or outputs is not None else y + self.bias


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(num_planes, stored, scales, experts, scaled, level, outputs):
    """Returns the products of rows, ``[rows, n]``, float32 (see ``coded_linear.product``)."""
    if outputs is not None:
        return outputs

    def block(expert, rows):
        return product(num_planes, stored[expert], scales[expert], *rows)

    return map_blocks(block, (scaled, level), experts, num_experts=len(stored), outputs=stored.shape[2])


def _product_forward(num_planes, stored, scales, experts, scaled, level, outputs):
    # The residuals must be a pytree, so an empty array carries the dtype.
    residuals = stored, scales, experts, level, jnp.zeros(0, scaled.dtype)
    return _product(num_planes, stored, scales, experts, scaled, level, outputs), residuals


def _product_backward(num_planes, residuals, gradient):
    stored, scales, experts, level, like = residuals

    def block(expert, rows):
        gradient, level = rows
        back = inputs_gradient(num_planes, stored[expert], scales[expert], gradient, level)
        return back.astype(jnp.float32)

    rows = gradient.astype(like.dtype), level
    back = map_blocks(block, rows, experts, num_experts=len(stored), outputs=stored.shape[1])
    return None, None, None, back.astype(like.dtype), None, None


_product.defvjp(_product_forward, _product_backward)
