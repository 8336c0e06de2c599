"""The two modules for linear layers: dense, and graded (stored as nested codes)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float16, UInt32

from grinqh_jax.model.partition import InputCut
from pallas_kernels import (
    Activations,
    GradingStats,
    NestedWeight,
    dequantization,
    dequantize,
    graded_partial_sums,
    level_matmul,
)
from pallas_kernels.matmul import choose as choose_level_matmul

CHECKPOINT_ATTRIBUTES = {"gains": "level_gains", "columns": "token_to_output"}
"""Attributes of modules that have another name in checkpoints, by that name."""

ROWS_OF_ONE_ROUNDING, OUTPUTS_OF_ONE_ROUNDING = 512, 512 * 4096
"""Least numbers of rows and of outputs of all rows for which XLA writes a product rounded. Otherwise cuBLAS
writes float32, and another kernel rounds. With few outputs XLA may divide the channels among CTAs, and would
add up rounded sums."""


class DenseLinear(nnx.Module):
    """An unquantized linear layer.

    Attributes:
      kernel: float32 or bfloat16 ``[in_features, out_features]``; Hugging Face stores the transpose.
      bias: Vector ``[out_features]`` that is added to the outputs, or None. If outputs are partial sums, all
        devices but the first have zeros.
      input_cut: How a mesh cuts the input channels, so that outputs are partial sums; None if it does not.
    """

    input_cut: InputCut | None = None

    def __init__(self, kernel: Float[Array, "k n"], bias: Float[Array, "n2"] | None = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)
        self.in_features, self.out_features = kernel.shape

    def dense(self, x: Float[Array, "*rows k"], dtype=None) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias``, summed in float32, in ``dtype`` (default: the dtype of x)."""
        return _matmul(x, self.kernel[...].astype(x.dtype), self.bias, dtype)


class GradedLinear(nnx.Module):
    """A linear layer stored as nested codes, with its calibrated table of thresholds.

    Attributes:
      planes, scales, level_gains: See ``pallas_kernels.NestedWeight``.
      thresholds: float32 ``[T, P]``, ascending along P. With the thresholds ``thresholds[t]`` the mean bits
        read of the calibration text are those of target t.
      max_activation: float32 scalar, largest ``|x|`` in calibration.
      bias: float32 ``[out_features]`` that is added to the outputs, or None.
      input_cut: See ``DenseLinear``.
    """

    input_cut: InputCut | None = None

    def __init__(
        self,
        planes: UInt32[Array, "p k w"],
        scales: Float16[Array, "s n"],
        thresholds: Float[Array, "t p"],
        level_gains: Float[Array, "p"],
        max_activation: Float[Array, ""],
        bias: Float[Array, "n2"] | None = None,
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
    def weight(self) -> NestedWeight:
        """The stored weight."""
        arrays = self.planes[...], self.scales[...]
        return NestedWeight(*arrays, self.in_features, self.out_features, self.level_gains[...])

    def dense(self, x: Float[Array, "*rows k"], dtype=None) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias`` as ``DenseLinear.dense`` does, and reads all planes.

        Dequantizes them to x's dtype, or, for as many rows as the tuning table of ``level_matmul`` says,
        multiplies by the planes.
        """
        # The weight is available before x. Without the barrier XLA (jax 0.11.2) dequantizes many layers in
        # one kernel ahead of all products, so that the whole dequantized model is in memory at once.
        weight, x = jax.lax.optimization_barrier((self.weight, x))
        if self._kernel_reads(x, weight.num_planes):
            return _finished(level_matmul(x, weight, weight.num_planes), self.bias, dtype or x.dtype)
        if dequantization.supports(weight, x.dtype) is None:
            kernel = dequantization.dequantize_to_bfloat16(weight)
        else:
            kernel = with_layout_constraint(dequantize(weight, dtype=x.dtype), Layout((0, 1)))
        return _matmul(x, kernel, self.bias, dtype)

    def at_level(self, x: Float[Array, "*rows k"], level: int, dtype=None) -> Float[Array, "*rows n"]:
        """Returns ``x @ W + bias`` as ``dense`` does, but reads every channel at ``level``."""
        weight, x = jax.lax.optimization_barrier((self.weight, x))  # as in ``dense``
        return _finished(level_matmul(x, weight, level), self.bias, dtype or x.dtype)

    def _kernel_reads(self, x: Float[Array, "*rows k"], level: int) -> bool:
        """Returns whether the kernel of ``level_matmul`` computes a product with ``x`` by default."""
        rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
        return choose_level_matmul(rows, self.weight, level) == "mosaic_gpu"

    def graded(self, x: Activations, thresholds: Float[Array, "*any p"]) -> tuple[Activations, GradingStats]:
        """Reads each channel at its level and returns ``(y, stats)`` (see ``graded_partial_sums``)."""
        y, stats = graded_partial_sums(x, self.weight, thresholds)
        return y if self.bias is None else y.plus(self.bias[...]), stats


Linear = DenseLinear | GradedLinear
"""A linear layer: ``y = x @ W + bias`` with ``W [in_features, out_features]``."""


def build_linear(tree: Mapping[str, Any], shape: tuple[int, int], compute_dtype) -> Linear:
    """Builds the module of a linear layer: dense if ``tree`` has a ``kernel``, else graded.

    Args:
      tree: Arrays of the layer by their names in a checkpoint.
      shape: ``(in_features, out_features)``. The arrays of a graded layer are padded, so they do not tell it.
      compute_dtype: Dtype that a dense kernel is cast to, float32 or bfloat16.
    """
    if "kernel" in tree:
        bias = None if "bias" not in tree else jnp.asarray(tree["bias"])
        return DenseLinear(jnp.asarray(tree["kernel"], compute_dtype), bias)
    leaves = {CHECKPOINT_ATTRIBUTES.get(key, key): leaf for key, leaf in tree.items()}
    return GradedLinear(**leaves, in_features=shape[0], out_features=shape[1])


def _matmul(x: jax.Array, kernel: jax.Array, bias: nnx.Param | None, dtype) -> jax.Array:
    dtype, rows = dtype or x.dtype, math.prod(x.shape[:-1])
    large = rows >= ROWS_OF_ONE_ROUNDING and rows * kernel.shape[1] >= OUTPUTS_OF_ONE_ROUNDING
    rounds = bias is None and large
    product = jnp.matmul(x, kernel, preferred_element_type=dtype if rounds else jnp.float32)
    return _finished(product, bias, dtype)


def _finished(product: jax.Array, bias: nnx.Param | None, dtype) -> jax.Array:
    """Returns a product, which is float32 if there is a bias, plus the bias, in ``dtype``."""
    product = product if bias is None else product + bias[...].astype(jnp.float32)
    return product.astype(dtype)
