"""Rounds one linear layer in ranges of outputs, measures the fit of its levels, and packs its codes."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.quantizers import LevelFit, Quantizer, RoundedWeight, level_fit
from grinqh_jax.errors import CheckpointError
from pallas_kernels import from_codes, layout
from pallas_kernels.weight import num_planes

RANGE_WEIGHTS = 1 << 23
"""Number of weights that are rounded in one call: 32 MiB as float32."""

ReadOutputs = Callable[[slice], Float[np.ndarray | Array, "k n"]]
"""Function from a range of outputs to their columns ``[in_features, outputs]``, in any float dtype."""

Refit = Callable[[Float[Array, "k n"], RoundedWeight, slice], tuple[Float[Array, "k n"], RoundedWeight]]
"""``refit(w, rounded, outputs) -> (w, rounded)``: changes weights of a range of outputs, and their codes."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rounding:
    """A linear layer and the parameters of its rounding.

    Attributes:
      name: Name of the layer in errors.
      shape: ``(in_features, out_features)``.
      inputs: Statistics of the layer's inputs.
      sensitivities: Sensitivity of each output (``calibration.sensitivity``).
      quantizer: See ``Quantizer``.
      max_bits: Bits of the stored codes.
    """

    name: str
    shape: tuple[int, int]
    inputs: LinearStatistics
    sensitivities: Float[np.ndarray, "n"]
    quantizer: Quantizer
    max_bits: int


def measure_linear(
    rounding: Rounding,
    read_outputs: ReadOutputs,
    refit: Refit | None = None,
    keep: Callable[[RoundedWeight], None] = lambda rounded: None,
) -> LevelFit:
    """Rounds a layer in ranges of outputs, and measures the fit of its levels.

    The errors of the levels follow from the rounded codes. The codes of a range are freed before the next
    range and are not packed into planes.

    Args:
      rounding: Layer to round.
      read_outputs: Reads the weights of a range of outputs.
      refit: Changes the weights of each range and their codes after rounding; None keeps both.
      keep: Called with the rounded weights of each range.

    Returns:
      Fit of the levels, float64, weighted by the sensitivities. The errors do not include level gains,
      because thresholds that are placed with them put more channels at level 1, and the model diverges more.

    Raises:
      CheckpointError: Weights or activations are not finite, or do not fit the codes' scales.
    """
    in_features, out_features = rounding.shape
    if not rounding.inputs.finite:
        raise CheckpointError(
            f"{rounding.name}: its inputs are not finite on the calibration text; the weights before it are"
            " damaged"
        )
    most = max(RANGE_WEIGHTS // in_features // layout.TILE, 1) * layout.TILE
    # Ranges of equal length share compiled programs.
    width = layout.round_up(-(-out_features // -(-out_features // most)), layout.TILE)
    planes, fits = num_planes(rounding.max_bits), []
    for start in range(0, out_features, width):
        outputs = slice(start, min(start + width, out_features))
        w = jnp.asarray(read_outputs(outputs), jnp.float32)
        try:
            rounded = rounding.quantizer(w, rounding.inputs, name=rounding.name)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if refit is not None:
            w, rounded = refit(w, rounded, outputs)
        keep(rounded)
        sensitivities = jnp.asarray(rounding.sensitivities[outputs], jnp.float32)
        fit = level_fit(w, rounded, sensitivities, num_planes=planes)
        fits.append([np.asarray(mean, np.float64) * w.shape[1] / out_features for mean in fit])
    return LevelFit(*(np.sum(means, axis=0) for means in zip(*fits, strict=True)))


def quantize_linear(
    rounding: Rounding, read_outputs: ReadOutputs, refit: Refit | None = None
) -> tuple[dict[str, np.ndarray], LevelFit]:
    """Rounds a layer as ``measure_linear`` does, and packs its codes.

    Args:
      rounding: Layer to round.
      read_outputs: Reads the weights of a range of outputs.
      refit: See ``measure_linear``.

    Returns:
      ``(leaves, fit)``: the leaves ``planes`` and ``scales`` of a ``GradedLinear``, in host memory, and the
      fit of the levels.

    Raises:
      CheckpointError: See ``measure_linear``.
    """
    planes, scales = [], []
    packed, (_, stored) = 0, layout.padded_shape(*rounding.shape)

    def pack(rounded: RoundedWeight) -> None:
        # All ranges but the last are whole tiles. The last one gets the padding of the whole layer.
        nonlocal packed
        packed += rounded.codes.shape[1]
        padding = ((0, 0), (0, stored - packed if packed == rounding.shape[1] else 0))
        arrays = (jnp.pad(array, padding) for array in rounded)
        weight = from_codes(*arrays, max_bits=rounding.max_bits)
        planes.append(np.asarray(weight.planes))
        scales.append(np.asarray(weight.scales))

    fit = measure_linear(rounding, read_outputs, refit, pack)
    return {"planes": np.concatenate(planes, axis=-1), "scales": np.concatenate(scales, axis=-1)}, fit


def fit_gains(fit: LevelFit) -> Float[np.ndarray, "p"]:
    """Returns the level gains that bring each level closest to the weights, float32.

    Least squares: ``g_l = 1 + E[w_l (w - w_l)] / E[w_l**2]`` minimizes ``E[(w - g_l w_l)**2]``. The gain of
    the highest level stays 1.
    """
    slopes, squares = fit.slopes, fit.squares
    gains = 1 + np.divide(slopes, squares, out=np.zeros_like(slopes), where=squares > 0)
    gains[-1] = 1
    return gains.astype(np.float32)
