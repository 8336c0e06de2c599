"""One linear layer from weights and statistics to what a checkpoint stores, in blocks of outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from checkpoints_tools.calibration.allocation import target_grid, threshold_table
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
    max_bits: int,
    name: str,
) -> dict[str, np.ndarray]:
    """Quantizes a layer and calibrates its thresholds.

    Args:
      read_outputs: gives the columns ``[in, outputs]`` of a range of outputs, in any float dtype.
      shape: ``(in_features, out_features)``.
      statistics: of the layer's inputs.
      quantizer: see ``Quantizer``.
      max_bits: bits of the stored codes.
      name: what an error calls the layer.

    Returns:
      The leaves of a ``GradedLinear``, in host memory: planes, scales, thresholds, max_activation.

    Raises:
      CheckpointError: weights or activations are not finite, or do not fit the codes' scales.
    """
    in_features, out_features = shape
    if not statistics.finite:
        raise CheckpointError(
            f"{name}: its inputs are not finite on the calibration text; the weights before it are damaged"
        )
    block = max(_BLOCK_WEIGHTS // in_features // layout.TILE, 1) * layout.TILE
    planes, scales, squared_errors = [], [], 0.0
    for start in range(0, out_features, block):
        outputs = slice(start, min(start + block, out_features))
        w = jnp.asarray(read_outputs(outputs), jnp.float32)
        try:
            weight = quantizer(w, statistics, max_bits=max_bits, name=name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        planes.append(np.asarray(weight.planes))
        scales.append(np.asarray(weight.scales))
        squared_errors += np.asarray(_level_errors(w, weight), np.float64) * w.shape[1]
    errors = squared_errors / out_features
    return {
        "planes": np.concatenate(planes, axis=-1),
        "scales": np.concatenate(scales, axis=-1),
        "thresholds": threshold_table(statistics.counts, errors, target_grid(max_bits)),
        "max_activation": np.float32(statistics.max_activation),
    }
