"""The residual stream turned onto its principal axes, rows of equal size: the same function, easier to grade.

Grading saves bits where a token's energy sits in few channels. The channels that a model was trained
with are not the best ones for that, and RMSNorm leaves the choice free: with ``r(x)`` the normalised
stream, ``g`` a norm's gains, ``W`` the projection behind it and any orthogonal ``Q``,

    ``(r(x) * g) @ W  =  (r(x Q) * s) @ (diag(1 / s) Q^T diag(g) W)``

because ``|x Q| = |x|``. So the embedding and everything that writes to the stream (``o``, ``down``) is
multiplied by ``Q`` on the right, everything that reads from it by ``Q^T diag(g)`` on the left, and nothing
is left to do at run time. Turning the stream for quantization is SliceGPT's idea (arXiv 2401.15024),
which cuts the least axes off; here every token decides for itself which ones it can spare.

* ``Q`` holds the eigenvectors of the second moments of ``r(x)``, summed over everything that reads
  from the stream, largest first: the energy of a typical token then lies in few channels.
* ``s_j`` is the size of row j over the geometric mean of all rows', each output weighted by how much the
  predictions depend on it (``calibration.sensitivity``). With rows of equal size, ``|x_j|`` alone says how
  much channel j matters, which is what it is graded by.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.layer import BLOCK_VALUES, WRITERS, dense_layer, embed, read_layer
from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.hf.reader import Rows
from grinqh_jax.model.apply import HEAD, Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import DecoderLayer
from pallas_kernels import codes

READERS = {"qkv": "input_norm", "gate_up": "post_norm", HEAD: "norm"}
"""Linear layers that read the residual stream, and the norm before each."""

GAIN_RANGE = 64.0
"""Gains stay within this factor of their mean: rows smaller than that are noise."""


@jax.jit(donate_argnums=0)
def _add(
    total: Float[Array, "d d"], moments: Float[Array, "d d"]
) -> tuple[Float[Array, "d d"], Bool[Array, ""]]:
    return total + moments, jnp.isfinite(moments).all()


@jax.jit
def _moments(x: Float[Array, "*rows t d"], gains: Float[Array, "d"]) -> Float[Array, "d d"]:
    """Of ``x / gains``, without the first positions; channels with a gain of 0 say nothing."""
    x = x[..., first_scored_position(x.shape[-2]) :, :].astype(jnp.float32)
    x = jnp.where(gains == 0, 0, x / jnp.where(gains == 0, 1, gains)).reshape(-1, x.shape[-1])
    return jnp.matmul(x.T, x, precision="highest")


class _Stream(Dense):
    """An ``apply`` strategy that collects the second moments of the stream that a layer reads."""

    def __init__(self, layer: DecoderLayer):
        self.layer = layer
        self.moments: dict[str, jax.Array] = {}

    def product(self, name: str, linear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        part = name.rpartition(".")[2]
        if part in READERS:
            self.moments[part] = _moments(x, getattr(self.layer, READERS[part]).scale[...])
        return super().product(name, linear, x)


@jax.jit
def _run_layer(layer: DecoderLayer, x: Float[Array, "1 t d"]):
    stream = _Stream(layer)
    return layer("layer", x, jnp.arange(x.shape[1])[None], stream)[0], stream.moments


@jax.jit
def _normalised(x: Float[Array, "t d"], eps: float | Float[Array, ""]) -> Float[Array, "t d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def second_moments(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    compute_dtype,
    done: Callable[[str], None] = lambda part: None,
) -> Float[np.ndarray, "d d"]:
    """Second moments of the normalised residual stream, summed over all that reads it (one layer in memory).

    Args:
      source: the checkpoint.
      windows: token ids; the first positions of each are left out (``statistics.first_scored_position``).
      compute_dtype: of the hidden states.
      done: called after each layer with its name.

    Raises:
      CheckpointError: weights or hidden states are NaN or Inf; names the layer.
    """
    config = source.config
    hidden = embed(source, windows, compute_dtype)
    # In float64, on the device: the sums are of many windows and layers, and each is as large as a kernel.
    with jax.enable_x64(True):
        total = jnp.zeros((config.hidden_size, config.hidden_size))
    for i in range(config.num_layers):
        kernels, norms = read_layer(source, i)
        for part, kernel in kernels.items():
            _check(kernel, f"layers.{i}.{part}")
        layer = dense_layer(source, kernels, norms, compute_dtype)
        for window in hidden:
            x, moments = _run_layer(layer, window[None])
            window[...] = x[0]
            for part in (part for part in READERS if part in moments):
                total = _with_moments(total, moments[part], f"layers.{i}.{part}")
        del kernel, kernels, layer  # or they would be in memory beside the next one's
        done(f"axes of layers.{i}")
    for window in hidden:
        moments = _moments(_normalised(window, config.rms_norm_eps), np.ones(config.hidden_size))
        total = _with_moments(total, moments, HEAD)
    return np.asarray(total)


def _check(kernel: np.ndarray, name: str) -> None:
    try:
        codes.check_quantizable(jnp.asarray(kernel), name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _with_moments(total: Float[Array, "d d"], moments: Float[Array, "d d"], name: str) -> Float[Array, "d d"]:
    with jax.enable_x64(True):
        total, finite = _add(total, moments)
    if not finite:
        raise CheckpointError(
            f"{name}: its inputs are not finite on the calibration text; the weights before it are damaged"
        )
    return total


def principal_axes(moments: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Orthogonal float32 ``Q``: eigenvectors in its columns, that of the largest eigenvalue first."""
    return np.ascontiguousarray(np.linalg.eigh(moments)[1][:, ::-1], np.float32)


def row_gains(squares: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    """``s``: the size of each row over the geometric mean, rounded to the bfloat16 that norms are stored in.

    Args:
      squares: sum of squares of every row.
    """
    sizes = np.sqrt(np.asarray(squares, np.float64))
    if not sizes.any():
        return np.ones(len(sizes), np.float32)
    typical = np.exp(np.log(sizes[sizes > 0]).mean())
    gains = np.clip(sizes / typical, 1 / GAIN_RANGE, GAIN_RANGE)
    return np.asarray(jnp.asarray(gains, jnp.bfloat16), np.float32)


@dataclasses.dataclass(frozen=True)
class RotatedCheckpoint:
    """A checkpoint that computes the same function as ``source`` in another basis, and is read like it.

    Kernels and the embedding keep their dtype, but for float64, which becomes float32; norms before the
    layers of ``READERS`` hold ``s``, float32.

    Attributes:
      source: the checkpoint.
      axes: orthogonal ``Q``, ``[hidden, hidden]``.
      sensitivities: weights of the outputs of each of the ``READERS`` layers in the size of a row, by name;
        all equal by default.
    """

    source: HFCheckpoint
    axes: Float[np.ndarray, "d d"]
    sensitivities: Mapping[str, Float[np.ndarray, "n"]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The source's."""
        return self.source.config

    @property
    def hf_config(self) -> dict[str, Any]:
        """The source's."""
        return self.source.hf_config

    @property
    def companions(self) -> list[Path]:
        """The source's."""
        return self.source.companions

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The source's."""
        return self.source.parameters

    def read(self, key: str, rows: Rows = slice(None)) -> np.ndarray | Array:
        """As ``HFCheckpoint.read``; what is turned is on the device, where it was turned.

        Args:
          key: which parameter.
          rows: may be given for the embedding and the head.

        Raises:
          CheckpointError: see ``HFCheckpoint.read``.
        """
        prefix, _, leaf = key.rpartition(".")
        above, _, part = prefix.rpartition(".")
        if leaf == "kernel" and part in READERS:
            kernel, dtype = self._turned(prefix, rows)
            if prefix not in self._gains and prefix != HEAD:
                self._gains[prefix] = row_gains(self._row_squares(prefix, kernel, rows))
            gains = self._gains_of(prefix)
            with jax.enable_x64(True):
                return _divided(kernel, jnp.asarray(gains, jnp.float64), dtype)
        for reader, norm in READERS.items():
            if part == norm:
                return self._gains_of(f"{above}.{reader}".removeprefix("."))
        value = self.source.read(key, rows)
        if part in WRITERS or key == "embed.embedding":
            return _product(value, self._axes).astype(_stored(value.dtype))
        return value

    @cached_property
    def _axes(self) -> Float[Array, "d d"]:
        return jnp.asarray(self.axes)

    @cached_property
    def _gains(self) -> dict[str, np.ndarray]:
        return {}

    def _gains_of(self, prefix: str) -> Float[np.ndarray, "d"]:
        """``s`` before a reader, from one pass over its outputs in blocks."""
        if prefix not in self._gains:
            width, outputs = self.parameters[f"{prefix}.kernel"]
            block = max(BLOCK_VALUES // width, 1) if prefix == HEAD else outputs
            squares = np.zeros(width)
            for start in range(0, outputs, block):
                rows = slice(start, min(start + block, outputs)) if block < outputs else slice(None)
                squares += self._row_squares(prefix, self._turned(prefix, rows)[0], rows)
            self._gains[prefix] = row_gains(squares)
        return self._gains[prefix]

    def _row_squares(self, prefix: str, kernel: Float[Array, "d n"], outputs: Rows) -> np.ndarray:
        weights = self.sensitivities.get(prefix, np.ones(self.parameters[f"{prefix}.kernel"][1]))
        # In float64, or the sums of long rows would depend on the order that a device adds in.
        with jax.enable_x64(True):
            return np.asarray(_weighted_squares(kernel, jnp.asarray(weights[outputs], jnp.float64)))

    def _turned(self, prefix: str, rows: Rows) -> tuple[Float[Array, "d n"], np.dtype]:
        """``Q^T diag(g) W`` of a reader, float32, and the dtype of W."""
        above, _, part = prefix.rpartition(".")
        gains = self.source.read(f"{above}.{READERS[part]}.scale".removeprefix(".")).astype(np.float32)
        kernel = self.source.read(f"{prefix}.kernel", rows)
        return _product(self._axes.T * gains, kernel), _stored(kernel.dtype)


def _stored(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype == np.float64 else dtype  # which a device does not take


@jax.jit
def _weighted_squares(kernel: Float[Array, "d n"], weights: Float[Array, "n"]) -> Float[Array, "d"]:
    return jnp.square(kernel).astype(jnp.float64) @ weights


@jax.jit(donate_argnums=0, static_argnums=2)
def _divided(kernel: Float[Array, "d n"], gains: Float[Array, "d"], dtype) -> Float[Array, "d n"]:
    # XLA multiplies by a reciprocal. In float64 the float32 quotient is right all the same.
    return (kernel.astype(jnp.float64) / gains[:, None]).astype(jnp.float32).astype(dtype)


@jax.jit
def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
