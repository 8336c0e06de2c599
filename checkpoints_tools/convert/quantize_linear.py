"""One linear layer from weights and statistics to what a checkpoint stores, in blocks of outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers import Quantizer
from grinqh_jax.errors import CheckpointError
from pallas_kernels import codes, layout

_BLOCK_WEIGHTS = 1 << 23
"""Weights quantized at a time: 32 MiB as float32."""

_level_fit = jax.jit(codes.level_fit)


def quantize_linear(
    read_outputs: Callable[[slice], Float[np.ndarray | Array, "k n"]],
    shape: tuple[int, int],
    statistics: LinearStatistics,
    quantizer: Quantizer,
    *,
    sensitivities: Float[np.ndarray, "n"],
    max_bits: int,
    gained: bool,
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
      gained: whether the levels get gains, or are taken as they are.
      name: of the layer: what an error calls it.

    Returns:
      ``(leaves, errors)``: the leaves of a ``GradedLinear`` that do not depend on other layers, in host
      memory: planes, scales, gains, max_activation; and float64 ``[P + 1]``, for each level the mean over
      the outputs of their mean squared weight error times their sensitivity. These errors do not count the
      gains: thresholds that do put more channels at level 1, and the model diverges more.

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
    fit = codes.LevelFit(*(np.sum(part, axis=0) for part in zip(*fits, strict=True)))
    leaves = {
        "planes": np.concatenate(planes, axis=-1),
        "scales": np.concatenate(scales, axis=-1),
        "gains": fit_gains(fit) if gained else np.ones(len(fit.slopes), np.float32),
        "max_activation": np.float32(statistics.max_activation),
    }
    return leaves, fit.errors


def fit_gains(fit: codes.LevelFit) -> Float[np.ndarray, "p"]:
    """Gains ``g_l`` that minimise ``E[(w - g_l w_l)**2]``: ``1 + E[w_l (w - w_l)] / E[w_l**2]``, float32.

    The highest level, full precision, is left as it is.
    """
    slopes, squares = fit.slopes, fit.squares
    gains = 1 + np.divide(slopes, squares, out=np.zeros_like(slopes), where=squares > 0)
    gains[-1] = 1
    return gains.astype(np.float32)
