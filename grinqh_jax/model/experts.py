"""Mixtures of experts: the router, and the linear layers of which each expert has one.

A token is as many rows as it has chosen experts. The linear layers of a mixture are applied to these rows by
the strategies of ``apply``, like any other linear layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Int, UInt32

from grinqh_jax.model.by_token import by_token
from grinqh_jax.model.expert_products import Kernels, all_at_once, jitted_matmul
from grinqh_jax.model.layer_spec import GatedExperts
from grinqh_jax.model.partition import InputCut
from pallas_kernels import (
    Activations,
    GradingStats,
    dequantization,
    dequantize,
    level_matmul,
    router,
)
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import experts_matvec
from pallas_kernels.experts.blocks import map_blocks
from pallas_kernels.router.grading_factor import grading_factor


class Chosen(NamedTuple):
    """The experts of each token.

    Attributes:
      experts: int32 experts, those with the largest probabilities first; shared ones are the last.
      probabilities: float32 factors of their results.
      inputs: Inputs of each expert, times its grading factor (see ``grading_factor``).
    """

    experts: Int[Array, "*rows c"]
    probabilities: Float[Array, "*rows c"]
    inputs: Activations


class Router(nnx.Module):
    """The router of a mixture.

    Attributes:
      kernel: bfloat16 or float32 ``[hidden, experts]``.
      bias: float32 ``[experts]`` that is added to the scores, or None.
    """

    def __init__(self, kernel: Float[Array, "d e"], bias: Float[Array, "e"] | None = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    @jax.named_scope("router")
    def __call__(self, inputs: Activations, mixture: GatedExperts) -> Chosen:
        """Returns the experts of each row ``[*rows, d]`` (see ``layer_spec.GatedExperts``).

        For the few rows of a decode step this is one kernel on a GPU, if there is no shared expert.
        """
        bias = None if self.bias is None else self.bias[...]
        if not mixture.shared and router.supports(inputs, self.kernel[...], mixture.chosen) is None:
            arguments = inputs, self.kernel[...], mixture.chosen
            return Chosen(*router.route(*arguments, normalized=mixture.normalized, bias=bias))
        x = inputs.array

        def chosen(x: Float[Array, "*rows d"]) -> tuple[Int[Array, "*rows c"], Float[Array, "*rows c"]]:
            return self._chosen(x, bias, mixture)

        experts, probabilities = by_token(chosen, x) if x.ndim == 3 else chosen(x)
        factor = grading_factor(probabilities)[..., None].astype(x.dtype)
        return Chosen(experts, probabilities, Activations.of(x[..., None, :] * factor))

    def _chosen(
        self, x: Float[Array, "*rows d"], bias: Float[Array, "e"] | None, mixture: GatedExperts
    ) -> tuple[Int[Array, "*rows c"], Float[Array, "*rows c"]]:
        """Returns the experts of each row and their probabilities, by XLA."""
        kernel = self.kernel[...].astype(x.dtype)
        scores = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias.astype(jnp.float32)
        routed = scores[..., :-1] if mixture.shared else scores
        probabilities, experts = jax.lax.top_k(jax.nn.softmax(routed, axis=-1), mixture.chosen)
        if mixture.normalized:
            probabilities = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
        if mixture.shared:
            shape = (*experts.shape[:-1], mixture.shared)
            last = routed.shape[-1] + jnp.arange(mixture.shared, dtype=experts.dtype)
            experts = jnp.concatenate([experts, jnp.broadcast_to(last, shape)], axis=-1)
            shared = jnp.broadcast_to(jax.nn.sigmoid(scores[..., -1:]), shape)
            probabilities = jnp.concatenate([probabilities, shared], axis=-1)
        return experts, probabilities


RowBias = Float[Array, "*rows n"] | None
"""A float32 vector that is added to the product of each row, or None."""


class DenseExperts(nnx.Module):
    """The unquantized linear layers of experts, of all or of a group of them.

    Attributes:
      kernel: Kernels in the dtype of the checkpoint, because a cast would take as much memory again.
      bias: Vector ``[experts, out_features]`` of all experts, added to the outputs of each, or None.
      first: Index of the first expert of ``kernel``; None if ``kernel`` has all experts.
      num_experts: Number of all experts.
      input_cut: See ``linear.DenseLinear``.
    """

    input_cut: InputCut | None = None

    def __init__(
        self,
        kernel: Kernels,
        bias: Float[Array, "e2 n2"] | None = None,
        *,
        first: int | None = None,
        num_experts: int | None = None,
    ):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.first = None if first is None else nnx.Param(jnp.asarray(first, jnp.int32))
        held, self.in_features, self.out_features = kernel.shape
        self.num_experts = num_experts or held

    def choose(self, experts: Int[Array, "*rows"], factors: Float[Array, "*rows"]) -> "ChosenDense":
        """Returns the linear layers of the experts of each row, whose inputs are times ``factors``."""
        kernel, of_rows = self.kernel[...], experts
        if self.first is not None:
            of_rows = experts - self.first[...]
            is_held = (of_rows >= 0) & (of_rows < len(kernel))
            of_rows, factors = jnp.where(is_held, of_rows, len(kernel)), jnp.where(is_held, factors, 0)
        bias = bias_of(self, experts, factors)
        return ChosenDense(kernel, of_rows, bias, self.input_cut, self.num_experts)


class GradedExperts(nnx.Module):
    """The linear layers of experts, stored as nested codes.

    All experts share thresholds and level gains. An expert that is rarely chosen in calibration is therefore
    graded like the others.

    Attributes:
      planes, scales, level_gains: See ``pallas_kernels.NestedExperts``.
      thresholds, max_activation, input_cut: See ``GradedLinear``.
      bias: See ``DenseExperts``; float32.
    """

    input_cut: InputCut | None = None

    def __init__(
        self,
        planes: UInt32[Array, "e p k w"],
        scales: Float16[Array, "e s n"],
        thresholds: Float[Array, "t p"],
        level_gains: Float[Array, "p"],
        max_activation: Float[Array, ""],
        bias: Float[Array, "e2 n2"] | None = None,
        *,
        in_features: int,
        out_features: int,
    ):
        self.planes = nnx.Param(planes)
        self.scales = nnx.Param(scales)
        self.thresholds = nnx.Param(thresholds)
        self.level_gains = nnx.Param(level_gains)
        self.max_activation = nnx.Param(max_activation)
        self.bias = None if bias is None else nnx.Param(bias)
        self.in_features, self.out_features = in_features, out_features

    @property
    def weight(self) -> NestedExperts:
        """The stored weights."""
        arrays = self.planes[...], self.scales[...]
        return NestedExperts(*arrays, self.in_features, self.out_features, self.level_gains[...])

    def choose(self, experts: Int[Array, "*rows"], factors: Float[Array, "*rows"]) -> "ChosenGraded":
        """Returns the linear layers of the experts of each row, whose inputs are times ``factors``."""
        return ChosenGraded(self.weight, experts, bias_of(self, experts, factors), self.input_cut)


def bias_of(module: Any, experts: Int[Array, "*rows"], factors: Float[Array, "*rows"]) -> RowBias:
    """Returns the bias of the expert of each row; None if the linear layers of experts have none.

    Args:
      module: Linear layers of experts, with an attribute ``bias``.
      experts: Expert of each row.
      factors: Factors of the rows' inputs, which the products and thus the biases have, too.
    """
    if module.bias is None:
        return None
    return module.bias[...][experts].astype(jnp.float32) * factors[..., None]


class ChosenDense(NamedTuple):
    """A linear layer of another expert for each row; has the methods of ``DenseLinear``.

    Attributes:
      kernel: Kernels of all experts, or of a group.
      experts: Expert of each row, an index into ``kernel``; ``len(kernel)`` for experts outside of the group.
      bias: See ``bias_of``.
      input_cut: See ``linear.DenseLinear``.
      num_experts: Number of all experts; None for those of ``kernel``.
    """

    kernel: Kernels
    experts: Int[Array, "*rows"]
    bias: RowBias = None
    input_cut: InputCut | None = None
    num_experts: int | None = None

    @property
    def is_held(self) -> Bool[Array, "*rows"] | None:
        """Whether the expert of each row is in the group; None if ``kernel`` has all experts."""
        whole = self.num_experts in (None, len(self.kernel))
        return None if whole else self.experts < len(self.kernel)

    def dense(self, x: Float[Array, "*rows k"], dtype=None) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias`` of each row's expert, summed in float32, in ``dtype`` (default: x's).

        Rows of experts outside of the group get zeros.
        """
        arguments = x.reshape(-1, x.shape[-1]), self.kernel, self.experts.reshape(-1)
        y = jitted_matmul(*arguments, self.num_experts or len(self.kernel))
        return _finished(y, self.bias, x, dtype)


class ChosenGraded(NamedTuple):
    """A graded linear layer of another expert for each row; has the methods of ``GradedLinear``.

    Attributes:
      weight: Weights of all experts.
      experts: Expert of each row.
      bias: See ``bias_of``.
      input_cut: See ``linear.DenseLinear``.
    """

    weight: NestedExperts
    experts: Int[Array, "*rows"]
    bias: RowBias = None
    input_cut: InputCut | None = None

    def dense(self, x: Float[Array, "*rows k"], dtype=None) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias`` as ``ChosenDense.dense`` does, and reads all planes.

        Where the kernel of ``dequantization`` can run, it dequantizes all experts at once. Else one expert is
        dequantized after another.
        """
        return self._product(x, None, dtype)

    def at_level(self, x: Float[Array, "*rows k"], level: int, dtype=None) -> Float[Array, "*rows n"]:
        """Returns what ``dense`` does, but reads every channel at ``level`` (see ``level_matmul``)."""
        return self._product(x, level, dtype)

    def _product(self, x: Float[Array, "*rows k"], level: int | None, dtype) -> Float[Array, "*rows n"]:
        """Returns ``at_level``; None is the level of all planes."""
        # Without the barrier XLA may dequantize weights of many layers ahead (see ``GradedLinear.dense``).
        weight, x = jax.lax.optimization_barrier((self.weight, x))
        rows, experts = x.reshape(-1, x.shape[-1]), self.experts.reshape(-1)
        if dequantization.supports(weight, x.dtype) is None:
            kernel = dequantization.dequantize_to_bfloat16(weight, level)
            y = all_at_once(rows, kernel, experts, weight.num_experts)
            y = y if level is None or weight.level_gains is None else y * weight.level_gains[level - 1]
            return _finished(y, self.bias, x, dtype)

        def block(expert: Int[Array, ""], rows: Float[Array, "block k"]) -> Float[Array, "block n"]:
            one = weight.expert(expert)
            if level is not None:
                return level_matmul(rows, one, level)
            return jnp.matmul(rows, dequantize(one, dtype=x.dtype), preferred_element_type=jnp.float32)

        of_all = {"num_experts": weight.num_experts, "outputs": weight.out_features}
        return _finished(map_blocks(block, rows, experts, **of_all), self.bias, x, dtype)

    def graded(self, x: Activations, thresholds: Float[Array, "*any p"]) -> tuple[Activations, GradingStats]:
        """Reads each channel at its level, and returns outputs and statistics (see ``experts_matvec``)."""
        y, stats = experts_matvec(x, self.weight, self.experts, thresholds)
        return y if self.bias is None else y.plus(self.bias), stats


def _finished(
    product: Float[Array, "flat n"], bias: RowBias, x: Float[Array, "*rows k"], dtype
) -> Float[Array, "*rows n"]:
    """Returns float32 products plus the bias, for each row of x, in ``dtype`` or that of x."""
    y = product.reshape(*x.shape[:-1], -1)
    return (y if bias is None else y + bias).astype(dtype or x.dtype)


def build_experts(tree: Mapping[str, Any], shape: tuple[int, int]) -> DenseExperts | GradedExperts:
    """Builds the linear layers of experts: dense if ``tree`` has a ``kernel``, else graded.

    Args:
      tree: Arrays by their names in a checkpoint.
      shape: ``(in_features, out_features)`` of each expert.
    """
    if "kernel" in tree:
        bias = None if "bias" not in tree else jnp.asarray(tree["bias"])
        return DenseExperts(jnp.asarray(tree["kernel"]), bias)
    leaves = {"level_gains" if key == "gains" else key: leaf for key, leaf in tree.items()}
    return GradedExperts(**leaves, in_features=shape[0], out_features=shape[1])
