"""One linear layer from weights and statistics to what a checkpoint stores, in blocks of outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers import Quantizer
from grinqh_jax.errors import CheckpointError
from pallas_kernels import codes, layout

_BLOCK_WEIGHTS = 1 << 23
"""Weights quantized at a time: 32 MiB as float32."""

_level_errors = jax.jit(codes.level_errors)


def quantize_linear(
    read_outputs: Callable[[slice], Float[np.ndarray, "k n"]],
    shape: tuple[int, int],
    statistics: LinearStatistics,
    quantizer: Quantizer,
    *,
    sensitivities: Float[np.ndarray, "n"],
    max_bits: int,
    name: str,
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, "p1"]]:
    """Quantizes a layer.

    Args:
      read_outputs: gives the columns ``[in, outputs]`` of a range of outputs, in any float dtype.
      shape: ``(in_features, out_features)``.
      statistics: of the layer's inputs.
      quantizer: see ``Quantizer``.
      sensitivities: of its outputs (``calibration.sensitivity``).
      max_bits: bits of the stored codes.
      name: what an error calls the layer.

    Returns:
      ``(leaves, errors)``: the leaves of a ``GradedLinear`` that do not depend on other layers, in host
      memory: planes, scales, max_activation; and float64 ``[P + 1]``, for each level the mean over the
      outputs of their mean squared weight error times their sensitivity.

    Raises:
      CheckpointError: weights or activations are not finite, or do not fit the codes' scales.
    """
    in_features, out_features = shape
    if not statistics.finite:
        raise CheckpointError(
            f"{name}: its inputs are not finite on the calibration text; the weights before it are damaged"
        )
    block = max(_BLOCK_WEIGHTS // in_features // layout.TILE, 1) * layout.TILE
    planes, scales, errors = [], [], np.zeros(max_bits // layout.DIGIT_BITS + 1)
    for start in range(0, out_features, block):
        outputs = slice(start, min(start + block, out_features))
        w = jnp.asarray(read_outputs(outputs), jnp.float32)
        try:
            weight = quantizer(w, statistics, max_bits=max_bits, name=name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        planes.append(np.asarray(weight.planes))
        scales.append(np.asarray(weight.scales))
        here = _level_errors(w, weight, jnp.asarray(sensitivities[outputs], jnp.float32))
        errors += np.asarray(here, np.float64) * w.shape[1] / out_features
    leaves = {
        "planes": np.concatenate(planes, axis=-1),
        "scales": np.concatenate(scales, axis=-1),
        "max_activation": np.float32(statistics.max_activation),
    }
    return leaves, errors
