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

_level_fit = jax.jit(codes.level_fit)


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
      memory: planes, scales, gains, max_activation; and float64 ``[P + 1]``, for each level the mean over
      the outputs of their mean squared weight error times their sensitivity.

    Raises:
      CheckpointError: weights or activations are not finite, or do not fit the codes' scales.
    """
    in_features, out_features = shape
    if not statistics.finite:
        raise CheckpointError(
            f"{name}: its inputs are not finite on the calibration text; the weights before it are damaged"
        )
    block = max(_BLOCK_WEIGHTS // in_features // layout.TILE, 1) * layout.TILE
    planes, scales, fits = [], [], []
    for start in range(0, out_features, block):
        outputs = slice(start, min(start + block, out_features))
        w = jnp.asarray(read_outputs(outputs), jnp.float32)
        try:
            weight = quantizer(w, statistics, max_bits=max_bits, name=name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        planes.append(np.asarray(weight.planes))
        scales.append(np.asarray(weight.scales))
        here = _level_fit(w, weight, jnp.asarray(sensitivities[outputs], jnp.float32))
        fits.append([np.asarray(mean, np.float64) * w.shape[1] / out_features for mean in here])
    gains, errors = fit_gains(*(np.sum(part, axis=0) for part in zip(*fits, strict=True)))
    leaves = {
        "planes": np.concatenate(planes, axis=-1),
        "scales": np.concatenate(scales, axis=-1),
        "gains": gains,
        "max_activation": np.float32(statistics.max_activation),
    }
    return leaves, errors


def fit_gains(
    errors: Float[np.ndarray, "p1"], slopes: Float[np.ndarray, "p"], squares: Float[np.ndarray, "p"]
) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "p1"]]:
    """Gains ``g_l`` that minimise ``(w - g_l w_l)**2``, and the errors with them.

    With ``w = w_l + d`` the mean square is ``e(l) + 2 (1 - g) E[w_l d] + (1 - g)**2 E[w_l**2]``, least at
    ``g = 1 + E[w_l d] / E[w_l**2]``. The highest level, full precision, is left as it is.

    Args:
      errors, slopes, squares: as in ``codes.LevelFit``.

    Returns:
      ``(gains, errors)``: float32 ``[P]`` and float64 ``[P + 1]``.
    """
    gains = 1 + np.divide(slopes, squares, out=np.zeros_like(slopes), where=squares > 0)
    gains[-1] = 1
    gains = gains.astype(np.float32)
    less = 1 - gains.astype(np.float64)
    return gains, np.concatenate([errors[:1], errors[1:] + 2 * less * slopes + less**2 * squares])
