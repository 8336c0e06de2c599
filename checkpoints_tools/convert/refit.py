"""Runs the windows that weights are refitted to through the original and the graded model.

In decoding the inputs of a linear layer differ from those that it was trained on: they carry the errors of
all layers before it, and some of them are skipped. The projections are therefore refitted (``least_squares``)
and quantized one after another, each on the inputs that the refitted and quantized projections before it
produce.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from checkpoints_tools.convert.coded_experts import CodedExperts
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.least_squares import FitWindow, Moments, moments, refitted
from checkpoints_tools.source.head import normed
from checkpoints_tools.source.passes import ALL_HELD
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.model.apply import Dense, in_head
from grinqh_jax.model.decoder_layer import DecoderLayer, RMSNorm
from grinqh_jax.model.layer_spec import GatedExperts, LayerSpec, ResidualBlock
from grinqh_jax.model.linear import DenseLinear
from pallas_kernels import Activations

BITS = 3.0
"""Mean bits that weights are fitted to. Other settings of the dial skip similar inputs."""

SHARE_OF_BITS = 0.75
"""Upper limit of these bits as a share of the stored bits, because a setting that reads all bits skips
nothing."""


class RefitStates:
    """States of the refit windows in front of a projection, in the original and in the graded model.

    The states stay on the device, because every range of outputs is fitted to all of them. ``advance``
    replaces them window by window, so that memory holds the states of one projection.

    Args:
      hidden: Hidden states ``[s, t, d]`` before the first layer.
      other: The same for windows of another kind of text, which only the original model reads.
      tables: Threshold table of every linear layer, by name.
      targets: Mean bits of the rows of the tables, ascending; the last one is the stored bits.
      layers: Structure of each layer.
    """

    def __init__(
        self,
        hidden: Float[np.ndarray, "s t d"],
        other: Float[np.ndarray, "s2 t2 d"],
        tables: Mapping[str, Float[np.ndarray, "targets p"]],
        targets: Sequence[float],
        layers: Sequence[LayerSpec],
    ):
        self._tables, self._targets, self._layers = tables, targets, layers
        self._bits = min(BITS, SHARE_OF_BITS * targets[-1])
        stream = [_on_device(window) for window in hidden]
        self._exact, self._graded = _ModelStates(stream), _ModelStates(list(stream))
        self._other = _ModelStates([_on_device(window) for window in other])
        self._moments_of: tuple[str, Moments | None] = "", None

    @property
    def streams(self) -> dict[str, Float[np.ndarray, "t d"]]:
        """Residual stream of each window in both models, to save and to resume. Set it between layers."""
        return {
            f"{name} {s}": np.asarray(x)
            for name, states in self._by_name.items()
            for s, x in enumerate(states.stream)
        }

    @streams.setter
    def streams(self, streams: Mapping[str, Shaped[np.ndarray, "t d"]]) -> None:
        for name, states in self._by_name.items():
            for s, x in enumerate(states.stream):  # A .npz file stores bfloat16 as untyped bytes.
                states.stream[s] = _on_device(streams[f"{name} {s}"].view(x.dtype))

    @property
    def _by_name(self) -> dict[str, "_ModelStates"]:
        return {"exact": self._exact, "graded": self._graded, "other": self._other}

    @property
    def other_inputs(self) -> list[Float[Array, "t2 k"]]:
        """Inputs of the current projection in the original model, for each window of another kind of text."""
        return self._other.inputs

    def apply_norm(self, norm: RMSNorm | None) -> None:
        """Moves the windows to the projection that reads the residual stream, through a norm or without."""
        for states in self._by_name.values():
            states.inputs = []  # Frees the inputs of the previous projection.
            states.inputs = [stream if norm is None else normed(norm, stream) for stream in states.stream]

    def fitted(self, name: str, w: Float[Array | np.ndarray, "k n"], outputs: slice) -> Float[Array, "k n"]:
        """Returns the refitted weights of some outputs of the current projection.

        Args:
          name: Name of the linear layer.
          w: Original weights of these outputs.
          outputs: Range of the outputs.
        """
        least_read = self._thresholds(name)[0]
        deficits: list[Float[Array, "t n"] | None] = [None] * len(self._exact.inputs)
        block = self._block_written_by(name)
        # If a norm follows the projection, a deficit of the stream is not a deficit of its outputs.
        if block is not None and block.norm_after is None:
            pairs = zip(self._exact.stream, self._graded.stream, strict=True)
            deficits = [
                (exact[:, outputs] - graded[:, outputs]) / block.multiplier for exact, graded in pairs
            ]
        states = zip(self._exact.inputs, self._graded.inputs, deficits, strict=True)
        windows = [FitWindow(*window) for window in states]
        if self._moments_of[0] != name:  # All outputs have the same inputs.
            self._moments_of = name, moments(windows, least_read)
        return refitted(jnp.asarray(w), windows, least_read, self._moments_of[1])

    def advance(
        self, name: str, layer: DecoderLayer, linear: CodedLinear, level_gains: Float[np.ndarray, "p"]
    ) -> None:
        """Moves the windows past the current projection.

        Args:
          name: Name of the linear layer.
          layer: Original layer that contains it.
          linear: Its quantized form.
          level_gains: Its level gains.
        """
        projection = name.rpartition(".")[2]
        self._moments_of = "", None  # Frees matrices as large as all states.
        for states in (self._exact, self._other):
            states.advance(projection, layer, getattr(layer, projection), None)
        reading = Reading(self._thresholds(name), jnp.asarray(level_gains))
        self._graded.advance(projection, layer, linear, reading)

    def advance_mixture(
        self,
        prefix: str,
        layer: DecoderLayer,
        block: ResidualBlock,
        read_experts: Callable[[str], CodedExperts],
        level_gains: Mapping[str, Float[np.ndarray, "p"]],
        groups: Iterable[Any] = ALL_HELD,
    ) -> None:
        """Moves the windows past a mixture of experts, whose weights are not refitted.

        Args:
          prefix: Beginning of the names of the linear layers, ``layers.{i}.``.
          layer: Original layer that contains it. Its experts are replaced by the quantized ones, so that only
            one of both is in memory.
          block: Its block.
          read_experts: Returns the quantized experts of a projection.
          level_gains: Their level gains, by projection.
          groups: ``passes.each_group`` of the layer; by default it holds all experts.
        """
        self._moments_of = "", None  # Frees matrices as large as all states.
        for _ in groups:
            for states in (self._exact, self._other):
                states.add_mixture(layer, block, None)
        for states in (self._exact, self._other):
            states.advance_mixture(layer, block)
        for name in level_gains:
            delattr(layer, name)
        for name in level_gains:
            setattr(layer, name, read_experts(name))
        readings = {
            name: Reading(self._thresholds(prefix + name), jnp.asarray(gains))
            for name, gains in level_gains.items()
        }
        self._graded.add_mixture(layer, block, readings)
        self._graded.advance_mixture(layer, block)

    def _block_written_by(self, name: str) -> ResidualBlock | None:
        """Returns the block whose results a linear layer writes to the residual stream, if it does."""
        if in_head(name):
            return None
        _, i, projection = name.split(".")
        spec = self._layers[int(i)]
        return spec.block_of(projection) if projection in spec.writers else None

    def _thresholds(self, name: str) -> Float[Array, "p"]:
        return interpolate(jnp.asarray(self._tables[name]), self._targets, self._bits)


def _on_device(window: Float[np.ndarray, "t d"]) -> Float[Array, "t d"]:
    # Committed to the device, as are codes of experts that are read from a checkpoint, and what follows from
    # them. Otherwise the second layer would compile all programs once more.
    return jax.device_put(window, jax.local_devices()[0])


class Reading(NamedTuple):
    """Thresholds and level gains that a projection is read with.

    Attributes:
      thresholds: Thresholds of levels ``1..P``.
      level_gains: Gains of levels ``1..P``.
    """

    thresholds: Float[Array, "p"]
    level_gains: Float[Array, "p"]


class _ModelStates:
    """States of some windows in one of the two models.

    Attributes:
      stream: Residual stream of each window.
      inputs: Inputs of the current projection, for each window.
      written: Outputs of the experts of the current mixture, for each window; 0 before the first ones.
    """

    def __init__(self, stream: list[Float[Array, "t d"]]):
        self.stream = stream
        self.inputs: list[Float[Array, "t k"]] = []
        self.written: list[Any] = [0] * len(stream)

    def advance(
        self,
        projection: str,
        layer: DecoderLayer,
        linear: DenseLinear | CodedLinear,
        reading: Reading | None,
    ) -> None:
        """Moves the windows past a projection of ``layer``, which ``linear`` computes."""
        for s, inputs in enumerate(self.inputs):
            states = _advance(layer, linear, reading, self.stream[s], inputs, projection)
            # Waits, so that the intermediate values of only one window are in memory.
            self.stream[s], self.inputs[s] = jax.block_until_ready(states)

    def add_mixture(
        self,
        layer: DecoderLayer,
        block: ResidualBlock,
        readings: Mapping[str, Reading] | None,
    ) -> None:
        """Adds the outputs of the experts that ``layer`` holds; they are quantized if they have readings."""
        for s, inputs in enumerate(self.inputs):
            written = self.written[s] + _mixture(layer, readings, inputs, block)
            self.written[s] = jax.block_until_ready(written)

    def advance_mixture(self, layer: DecoderLayer, block: ResidualBlock) -> None:
        """Moves the windows past a mixture of ``layer`` whose outputs are complete."""
        for s, written in enumerate(self.written):
            self.stream[s], self.inputs[s] = _advance_mixture(layer, self.stream[s], written, block)
            self.written[s] = 0


class _CodedMixture:
    """An apply strategy that reads quantized experts."""

    def __init__(self, readings: Mapping[str, Reading]):
        self.readings = readings

    def __call__(self, name: str, linear: Any, x: Activations) -> Activations:
        reading = self.readings[name.rpartition(".")[2]]
        y = linear.graded(x.array, reading.thresholds, reading.level_gains)
        return Activations.of(y.astype(x.dtype))


@jax.jit(static_argnames="block")
def _mixture(
    layer: DecoderLayer,
    readings: Mapping[str, Reading] | None,
    inputs: Float[Array, "t d"],
    block: ResidualBlock,
) -> Float[Array, "t d"]:
    """Returns the sum of the outputs of each token's experts, of those that the layer holds."""
    assert isinstance(block.mixer, GatedExperts), "the block is a mixture of experts"
    apply = Dense() if readings is None else _CodedMixture(readings)
    return layer.mixture("layer", block, block.mixer, Activations.of(inputs[None]), apply).array[0]


@jax.jit(static_argnames="block")
def _advance_mixture(
    layer: DecoderLayer, stream: Float[Array, "t d"], written: Float[Array, "t d"], block: ResidualBlock
) -> tuple[Float[Array, "t d"], Float[Array, "t d"]]:
    """Returns the residual stream after a mixture, and the inputs of the next projection of its layer."""
    return _after(layer, block, stream, Activations.of(written))


@jax.jit(static_argnames="projection")
def _advance(
    layer: DecoderLayer,
    linear: DenseLinear | CodedLinear,
    reading: Reading | None,
    stream: Float[Array, "t d"],
    inputs: Float[Array, "t k"],
    projection: str,
) -> tuple[Float[Array, "t d"], Float[Array, "t k2"]]:
    """Returns the residual stream after a projection and the inputs of the next one in its layer.

    After the last projection of a layer the returned inputs have no meaning.
    """
    if isinstance(linear, CodedLinear):
        assert reading is not None, "a graded projection is read at levels"
        outputs = linear.graded(inputs, reading.thresholds, reading.level_gains).astype(inputs.dtype)
    else:
        outputs = linear.dense(inputs)
    block = layer.spec.block_of(projection)
    if projection == block.reads.name:
        mixed, _ = layer.mix(block, Activations.of(outputs[None]), jnp.arange(len(stream))[None])
        return stream, mixed.array[0]
    return _after(layer, block, stream, Activations.of(outputs))


def _after(
    layer: DecoderLayer, block: ResidualBlock, stream: Float[Array, "t d"], written: Activations
) -> tuple[Float[Array, "t d"], Float[Array, "t d"]]:
    """Returns the residual stream after a block, and the inputs of the next one if there is one."""
    stream = stream + layer.update(block, written).array
    following = layer.spec.block_after(block)
    return stream, stream if following is None else layer.inputs(following, stream[None], None)[1].array[0]
