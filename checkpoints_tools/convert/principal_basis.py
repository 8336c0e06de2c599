"""Rotates the residual stream onto its principal axes: the model computes the same function, with fewer bits.

Grading saves bits if the energy of a token lies in few channels. The channels that a model was trained with
are not the best ones for that, and RMSNorm allows any orthogonal basis. With ``r(x)`` the normalised stream,
``g`` a norm scale, ``W`` the projection behind it and any orthogonal ``Q``,

    ``(r(x) * g) @ W  =  (r(x Q) * s) @ (diag(1 / s) Q^T diag(g) W)``

because ``|x Q| = |x|``. So the embedding and the projections that write the stream (``o``, ``down``) are
multiplied by ``Q`` on the right, and the projections that read it by ``Q^T diag(g)`` on the left. The router
of a mixture of experts is another ``W`` behind the norm of the experts. At run time this costs nothing.
SliceGPT (arXiv 2401.15024) rotates the stream to remove its smallest axes; here each token determines which
axes it skips.

* ``Q`` holds the eigenvectors of the second moments of ``r(x)``, summed over all readers of the stream,
  largest first, so the energy of a typical token lies in few channels.
* ``s_j``, the channel scale, is the size of input channel j of ``W`` over the geometric mean of all, with
  each output weighted by its sensitivity (``calibration.sensitivity``). All channels of ``W`` then have equal
  size, so ``|x_j|``, which grades a channel, is its importance.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from checkpoints_tools.calibration.sensitivity import ForwardStates
from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.layer import VALUES_IN_MEMORY, dense_layer, each_expert, embed, read_layer
from checkpoints_tools.source.passes import Observing, each_group, pass_windows
from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.hf.params import is_of_experts
from grinqh_jax.hf.reader import Rows
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder_layer import DecoderLayer
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import EMBEDDING, routers, stream_readers, stream_writers
from pallas_kernels import codes

CHANNEL_SCALE_RANGE = 64.0
"""Largest factor between a channel scale and 1. Channels that are even smaller are noise."""


@jax.jit(donate_argnums=0)
def _add(
    total: Float[Array, "d d"], moments: Float[Array, "d d"]
) -> tuple[Float[Array, "d d"], Bool[Array, ""]]:
    return total + moments, jnp.isfinite(moments).all()


@jax.jit
def _moments(x: Float[Array, "*rows t d"], norm_scale: Float[Array, "d"]) -> Float[Array, "d d"]:
    """Returns second moments of ``x / norm_scale`` at scored positions; 0 in channels with a scale of 0."""
    x = x[..., first_scored_position(x.shape[-2]) :, :].astype(jnp.float32)
    x = jnp.where(norm_scale == 0, 0, x / jnp.where(norm_scale == 0, 1, norm_scale)).reshape(-1, x.shape[-1])
    return jnp.matmul(x.T, x, precision="highest")


def _one_of_experts(
    x: Float[Array, "b t *experts d"], norm_scale: Float[Array, "d"]
) -> Float[Array, "b t d"]:
    """Returns the normalised stream that a reader gets. Experts get multiples of it (``grading_factor``)."""
    if x.ndim == 3:
        return x
    one = x[:, :, 0].astype(jnp.float32)
    stream = one / jnp.where(norm_scale == 0, 1, norm_scale)
    size = jnp.sqrt(jnp.mean(stream**2, axis=-1, keepdims=True))
    return one / jnp.where(size == 0, 1, size)


class _Stream(Observing):
    """An apply strategy that collects the second moments of the normalised stream, by its readers."""

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        self.layer = layer

    def product(self, name: str, linear, x: Float[Array, "b t *experts k"]) -> Float[Array, "b t *experts n"]:
        projection = name.rpartition(".")[2]
        if norm := self.layer.spec.readers.get(projection):
            norm_scale = getattr(self.layer, norm.name).scale[...]
            self.seen[projection] = _moments(_one_of_experts(x, norm_scale), norm_scale)
        return super().product(name, linear, x)


@jax.jit
def _normalised(x: Float[Array, "t d"], eps: float | Float[Array, ""]) -> Float[Array, "t d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def second_moments(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    compute_dtype,
    on_progress: Callable[[str], None] = lambda note: None,
    states: ForwardStates | None = None,
) -> Float[np.ndarray, "d d"]:
    """Sums the second moments of the normalised residual stream over all projections that read it.

    One layer is in memory.

    Args:
      source: Checkpoint.
      windows: Token ids. Only scored positions count (``statistics.first_scored_position``).
      compute_dtype: Dtype of the hidden states.
      on_progress: Called with a note after each layer.
      states: Receives the states of the windows, which ``output_sensitivities`` uses; None drops them.

    Raises:
      CheckpointError: A weight or a hidden state is NaN or Inf. The message names the layer.
    """
    config = source.config
    hidden = embed(source, windows, compute_dtype)
    # Sums in float64 over many windows and layers, on the device because each sum is as large as a kernel.
    with jax.enable_x64(True):
        total = jnp.zeros((config.hidden_size, config.hidden_size))

    def add(layer: int, moments: dict[str, Array]) -> None:
        nonlocal total
        # In the order of the layer, so that an error names the first projection.
        for projection in filter(moments.__contains__, config.layers[layer].names):
            total = _with_moments(total, moments[projection], f"layers.{layer}.{projection}")

    for i in range(config.num_layers):
        kernels, vectors = read_layer(source, i, experts=False)
        _check(kernels, i)
        layer = dense_layer(source, i, kernels, vectors, compute_dtype)
        if states is not None:
            states.add_layer(hidden)
        pass_windows(layer, hidden, _checked(each_group(source, i, layer), i), _Stream, partial(add, i))
        del kernels, layer  # Frees them before the next layer is read.
        on_progress(f"forward layers.{i}")
    if states is not None:
        states.finish(hidden)
    for window in hidden:
        moments = _moments(_normalised(window, config.rms_norm_eps), np.ones(config.hidden_size))
        total = _with_moments(total, moments, HEAD)
    return np.asarray(total)


def _check(kernels: Mapping[str, np.ndarray | Array], i: int) -> None:
    """Raises CheckpointError if a kernel of layer ``i`` is not finite."""
    for projection, kernel in kernels.items():
        for matrix in each_expert(kernel) if kernel.ndim == 3 else [kernel]:
            try:
                codes.check_quantizable(jnp.asarray(matrix), f"layers.{i}.{projection}")
            except ValueError as error:
                raise CheckpointError(str(error)) from None


def _checked(groups: Iterable[dict[str, Array]], i: int) -> Iterator[None]:
    for kernels in groups:
        _check(kernels, i)
        yield


def _with_moments(total: Float[Array, "d d"], moments: Float[Array, "d d"], name: str) -> Float[Array, "d d"]:
    with jax.enable_x64(True):
        total, finite = _add(total, moments)
    if not finite:
        raise CheckpointError(
            f"{name}: its inputs are not finite on the calibration text; the weights before it are damaged"
        )
    return total


def principal_axes(moments: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Returns the orthogonal ``Q``, float32: the eigenvectors as columns, largest eigenvalue first."""
    return np.ascontiguousarray(np.linalg.eigh(moments)[1][:, ::-1], np.float32)


def channel_scales(squares: Float[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    """Returns ``s``: the size of each input channel over the geometric mean, float32 rounded to bfloat16.

    Norms are stored in bfloat16, so a checkpoint holds these numbers exactly.

    Args:
      squares: Sum of squares of each input channel.
    """
    sizes = np.sqrt(np.asarray(squares, np.float64))
    if not sizes.any():
        return np.ones(len(sizes), np.float32)
    typical = np.exp(np.log(sizes[sizes > 0]).mean())
    scales = np.clip(sizes / typical, 1 / CHANNEL_SCALE_RANGE, CHANNEL_SCALE_RANGE)
    return np.asarray(jnp.asarray(scales, jnp.bfloat16), np.float32)


@dataclasses.dataclass(frozen=True)
class RotatedCheckpoint:
    """A checkpoint that computes the same function as ``source`` in another basis, with the same interface.

    Kernels and the embedding keep their dtype, except that float64 becomes float32. Norms of the residual
    stream hold the channel scales, float32.

    Attributes:
      source: Original checkpoint.
      axes: Orthogonal ``Q``, ``[hidden, hidden]``.
      sensitivities: Sensitivity of each output of the projections that read the stream, by name. They weight
        the outputs in the size of a channel; all are equal by default.
    """

    source: HFCheckpoint
    axes: Float[np.ndarray, "d d"]
    sensitivities: Mapping[str, Float[np.ndarray, "_"]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """See ``HFCheckpoint``."""
        return self.source.config

    @property
    def hf_config(self) -> dict[str, Any]:
        """See ``HFCheckpoint``."""
        return self.source.hf_config

    @property
    def companions(self) -> list[Path]:
        """See ``HFCheckpoint``."""
        return self.source.companions

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """See ``HFCheckpoint``."""
        return self.source.parameters

    def read(self, key: str, rows: Rows = slice(None)) -> np.ndarray | Array:
        """Reads a parameter as ``HFCheckpoint.read`` does; rotated parameters are on the device.

        Args:
          key: Name of the parameter.
          rows: Rows as stored, only for the embedding and the head; or a range of experts.

        Raises:
          CheckpointError: See ``HFCheckpoint.read``.
        """
        name, _, leaf = key.rpartition(".")
        readers = stream_readers(self.config)
        if leaf == "kernel" and name in routers(self.config):
            reader = routers(self.config)[name]
            return self._divided(*self._rotated(name, readers[reader]), reader)
        if leaf == "kernel" and is_of_experts(self.config, key):
            assert isinstance(rows, slice), "experts are read in ranges"
            return self._read_experts(name, range(*rows.indices(self.config.num_experts)))
        if leaf == "kernel" and name in readers:
            kernel, dtype = self._rotated(name, readers[name], rows)
            if name not in self._channel_scales and name != HEAD:
                self._channel_scales[name] = channel_scales(self._channel_squares(name, kernel, rows))
            return self._divided(kernel, dtype, name)
        if leaf == "scale" and name in readers.values():
            return self._channel_scales_of(next(reader for reader, norm in readers.items() if norm == name))
        value = self.source.read(key, rows)
        if name in stream_writers(self.config) or key == EMBEDDING:
            rotated = _product(np.atleast_2d(value), self._axes).astype(_device_dtype(value.dtype))
            return rotated.reshape(value.shape)
        return value

    def _read_experts(self, name: str, experts: range) -> Float[np.ndarray, "e k n"]:
        """Reads the kernels of some experts, one after another, so that one is in float32 at once."""
        kernels = None
        norm = stream_readers(self.config).get(name)
        for i, expert in enumerate(experts):
            rows = slice(expert, expert + 1)
            if norm is not None:
                kernel = np.asarray(self._divided(*self._rotated(name, norm, rows), name))
            else:
                kernel = self.source.read(f"{name}.kernel", rows)[0]
                if name in stream_writers(self.config):
                    kernel = np.asarray(_product(kernel, self._axes).astype(_device_dtype(kernel.dtype)))
            if kernels is None:
                kernels = np.empty((len(experts), *kernel.shape), kernel.dtype)
            kernels[i] = kernel
        assert kernels is not None, "at least one expert is read"
        return kernels

    def _divided(self, kernel: Float[Array, "d n"], dtype: np.dtype, reader: str) -> Float[Array, "d n"]:
        """Divides a rotated kernel by the channel scales of a projection, and casts it."""
        scales = self._channel_scales_of(reader)
        with jax.enable_x64(True):
            return _divided(kernel, jnp.asarray(scales, jnp.float64), dtype)

    @cached_property
    def _axes(self) -> Float[Array, "d d"]:
        return jnp.asarray(self.axes)

    @cached_property
    def _channel_scales(self) -> dict[str, np.ndarray]:
        return {}

    def _channel_scales_of(self, name: str) -> Float[np.ndarray, "d"]:
        """Returns the channel scales of a projection that reads the stream, computed by ranges of outputs."""
        if name not in self._channel_scales:
            *experts, width, outputs = self.parameters[f"{name}.kernel"]
            norm = stream_readers(self.config)[name]
            squares = np.zeros(width)
            for expert in range(*experts or [0]):
                kernel = self._rotated(name, norm, slice(expert, expert + 1))[0]
                squares += self._channel_squares(name, kernel, slice(None))
            size = max(VALUES_IN_MEMORY // width, 1) if name == HEAD else outputs
            for start in range(0, 0 if experts else outputs, size):
                rows = slice(start, min(start + size, outputs)) if size < outputs else slice(None)
                squares += self._channel_squares(name, self._rotated(name, norm, rows)[0], rows)
            self._channel_scales[name] = channel_scales(squares)
        return self._channel_scales[name]

    def _channel_squares(self, name: str, kernel: Float[Array, "d n"], outputs: Rows) -> np.ndarray:
        weights = self.sensitivities.get(name, np.ones(self.parameters[f"{name}.kernel"][-1]))
        # In float32 the sums of many outputs would depend on the order in which a device adds.
        with jax.enable_x64(True):
            return np.asarray(_weighted_squares(kernel, jnp.asarray(weights[outputs], jnp.float64)))

    def _rotated(
        self, name: str, norm: str | None, rows: Rows = slice(None)
    ) -> tuple[Float[Array, "d n"], np.dtype]:
        """Returns ``Q^T diag(g) W`` of a reader, float32, and the dtype that W keeps.

        Args:
          name: Name of the reader, also of a router.
          norm: Name of the norm that it reads the stream through.
          rows: Rows as stored, or one expert.
        """
        norm_scale = self.source.read(f"{norm}.scale").astype(np.float32)
        kernel = self.source.read(f"{name}.kernel", rows)
        kernel = kernel[0] if kernel.ndim == 3 else kernel
        return _product(self._axes.T * norm_scale, kernel), _device_dtype(kernel.dtype)


def _device_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype that a device stores: float32 for float64."""
    return np.dtype(np.float32) if dtype == np.float64 else dtype


@jax.jit
def _weighted_squares(kernel: Float[Array, "d n"], weights: Float[Array, "n"]) -> Float[Array, "d"]:
    return jnp.square(kernel).astype(jnp.float64) @ weights


@jax.jit(donate_argnums=0, static_argnums=2)
def _divided(kernel: Float[Array, "d n"], scales: Float[Array, "d"], dtype) -> Float[Array, "d n"]:
    # XLA multiplies by the reciprocal. In float64 that still yields the correctly rounded float32 quotient.
    return (kernel.astype(jnp.float64) / scales[:, None]).astype(jnp.float32).astype(dtype)


@jax.jit
def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
