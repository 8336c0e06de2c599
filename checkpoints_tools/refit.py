"""Weights refitted to the inputs that graded reading gives them: sequential least squares.

In decoding a linear layer does not see what it was trained on. Its inputs carry the errors of all layers
before it, and part of them is skipped. With ``x`` its inputs in the original, ``z`` those at some bits,
zeros where they are skipped, and ``h_x`` and ``h_z`` the residual stream there and here, the weights that
come closest to the original ``W``, both on ``z`` and, so that full precision stays what it was, on ``x``, are

    ``W' = argmin E|z W' - y|**2 + c E|x W' - x W|**2``,    ``y = x W + (h_x - h_z)`` if the outputs are added
                                                            to the stream (they make up for what it lacks),
                                                            else ``y = x W``

or, with ``A = z^T z + c x^T x`` and ``G = z^T (y - z W)``, damped, ``W' = W + A^-1 G``. Projections are
refitted and quantized one after the other, each on the inputs that those before it, refitted and quantized,
really produce. (Fitting quantized inputs to original outputs: GPTAQ, arXiv 2504.02692. Here the errors come
from grading, and one weight serves all settings of the dial.)

A fit of K numbers to T tokens also fits their noise: it gains ``K / T`` of the residual energy by chance. The
step is shortened by what that is of the whole gain (James and Stein 1961).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped

from checkpoints_tools.calibration.statistics import first_counted
from checkpoints_tools.source_layer import WRITERS
from grinqh_jax.apply import Dense, Graded
from grinqh_jax.attention import attend_heads
from grinqh_jax.decoder import DecoderLayer, RMSNorm
from grinqh_jax.linear import GradedLinear, Linear
from grinqh_jax.swiglu import swiglu
from grinqh_jax.thresholds import interpolate

BITS = 3.0
"""The setting of the dial that is fitted to: what is skipped at others is much the same."""

SHARE_OF_BITS = 0.75
"""At most so much of a code of few bits, or nothing would be skipped."""

STAY = 2.0
"""``c``: what the model at full precision counts for."""

TOKENS = 32768
"""At most so many tokens are fitted to: time grows with them."""

LEAST_TOKENS = 4096
"""With fewer nothing is refitted: they show too few of the inputs that a layer may have."""

HIDDEN_BYTES = 1 << 26
"""At most so many bytes of hidden states are kept, of the original and again of the graded model."""

DAMPING = 0.01
"""Added to the diagonal of A, in units of its mean."""

ANY_LAYER = "layer"
"""What every linear layer is called here, so that layers share their compiled programs."""


def fitting_windows(windows: Int32[np.ndarray, "s t"], token_bytes: int) -> Int32[np.ndarray, "s2 t"]:
    """The first of the calibration windows, as many as are fitted to (at least one).

    Args:
      windows: token ids.
      token_bytes: size of one token's hidden state.
    """
    tokens = min(TOKENS, HIDDEN_BYTES // token_bytes)
    return windows[: max(tokens // windows.shape[1], 1)]


class Refit:
    """The calibration windows on their way through the layers, as in the original and graded.

    Args:
      hidden: hidden states ``[s, t, d]`` before the first layer, in host memory; changed in place.
      tables: thresholds of every linear layer, by name.
      targets: mean bits of the tables' rows, ascending; the last is the codes' own.
    """

    def __init__(
        self,
        hidden: Float[np.ndarray, "s t d"],
        tables: Mapping[str, Float[np.ndarray, "targets p"]],
        targets: Sequence[float],
    ):
        self._tables, self._targets = tables, targets
        self._bits = min(BITS, SHARE_OF_BITS * targets[-1])
        self._exact, self._graded = _Windows(hidden), _Windows(hidden.copy())

    @property
    def streams(self) -> dict[str, Float[np.ndarray, "s t d"]]:
        """The residual stream of all windows, in the original and here; may be set, between two layers."""
        return {"exact": self._exact.stream, "graded": self._graded.stream}

    @streams.setter
    def streams(self, streams: Mapping[str, Shaped[np.ndarray, "s t d"]]) -> None:
        dtype = self._exact.stream.dtype  # which a file does not tell, if it is bfloat16
        self._exact.stream, self._graded.stream = streams["exact"].view(dtype), streams["graded"].view(dtype)

    def enter(self, norm: RMSNorm) -> None:
        """Goes to the projection behind a norm of the residual stream."""
        for windows in (self._exact, self._graded):
            windows.inputs = [np.asarray(_normed(norm, stream)) for stream in windows.stream]

    def fitted(self, name: str, w: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        """The refitted weights of the projection that the windows are before, or of some of its outputs.

        Args:
          name: of the linear layer.
          w: its weights.
        """
        least_read = self._thresholds(name)[0]
        lacking = [None] * len(self._exact.inputs)
        if name.rpartition(".")[2] in WRITERS:
            lacking = list(self._exact.stream - self._graded.stream)
        windows = list(zip(self._exact.inputs, self._graded.inputs, lacking, strict=True))
        return refitted(w, windows, least_read)

    def pass_by(self, name: str, layer: DecoderLayer, linear: GradedLinear) -> None:
        """Takes the windows past a projection.

        Args:
          name: of the linear layer.
          layer: the original layer that it is in.
          linear: what it has become.
        """
        part = name.rpartition(".")[2]
        self._exact.pass_by(part, layer, getattr(layer, part), None)
        self._graded.pass_by(part, layer, linear, self._thresholds(name))

    def _thresholds(self, name: str) -> Float[Array, "p"]:
        return interpolate(jnp.asarray(self._tables[name]), self._targets, self._bits)


class _Windows:
    """Calibration windows before some projection.

    Attributes:
      stream: the residual stream ``[s, t, d]``, in host memory.
      inputs: of the projection, ``[t, k]`` for each window, likewise.
    """

    def __init__(self, stream: Float[np.ndarray, "s t d"]):
        self.stream = stream
        self.inputs: list[Float[np.ndarray, "t k"]] = []

    def pass_by(
        self, part: str, layer: DecoderLayer, linear: Linear, thresholds: Float[Array, "p"] | None
    ) -> None:
        """Takes the windows past ``part`` of a layer, computed by ``linear``."""
        for s, inputs in enumerate(self.inputs):
            stream, following = _pass_by(layer, linear, thresholds, self.stream[s], inputs, part)
            self.stream[s], self.inputs[s] = stream, np.asarray(following)


class _Sums(NamedTuple):
    """Over all tokens: ``A``, ``G``, and ``|y - z W|**2``."""

    a: Float[Array, "k k"]
    g: Float[Array, "k n"]
    energy: Float[Array, ""]


def refitted(
    w: Float[np.ndarray, "k n"],
    windows: Sequence[tuple],
    least_read: Float[Array, ""] | float,
) -> Float[np.ndarray, "k n"]:
    """``W'`` (see the module), float32.

    Args:
      w: ``W``.
      windows: of each window the exact inputs ``x [t, k]``, the inputs here ``[t, k]``, and what the outputs
        are to make up for, ``[t, n]`` or None.
      least_read: inputs here that are smaller in size are skipped.
    """
    w = jnp.asarray(w, jnp.float32)
    k, n = w.shape
    tokens = sum(len(here) - first_counted(len(here)) for _, here, _ in windows)
    if tokens <= k:  # All that could be gained would be chance.
        return np.asarray(w)
    sums = _Sums(jnp.zeros((k, k)), jnp.zeros((k, n)), jnp.zeros(()))
    for exact, here, lacking in windows:
        sums = _add(sums, exact, here, lacking, least_read, w)
        sums.energy.block_until_ready()  # or the arguments of many windows would be in memory at once
    return np.asarray(w + _step(sums, tokens))


@jax.jit(donate_argnums=0)
def _add(
    sums: _Sums,
    exact: Float[Array, "t k"],
    here: Float[Array, "t k"],
    lacking: Float[Array, "t n"] | None,
    least_read: Float[Array, ""] | float,
    w: Float[Array, "k n"],
) -> _Sums:
    counted = slice(first_counted(len(here)), None)
    x, z = (rows[counted].astype(jnp.float32) for rows in (exact, here))
    z = jnp.where(jnp.abs(z) < least_read, 0, z)
    residual = _product(x - z, w)
    if lacking is not None:
        residual += lacking[counted].astype(jnp.float32)
    return _Sums(
        sums.a + _product(z.T, z) + STAY * _product(x.T, x),
        sums.g + _product(z.T, residual),
        sums.energy + jnp.sum(residual**2),
    )


@jax.jit
def _step(sums: _Sums, tokens: Int[Array, ""] | int) -> Float[Array, "k n"]:
    """``A^-1 G``, damped, and shortened by the share of its gain that is chance."""
    k = len(sums.a)
    damped = sums.a + DAMPING * jnp.trace(sums.a) / k * jnp.eye(k)
    # A projection whose inputs are all zero has nothing to fit.
    damped = jnp.where(jnp.trace(sums.a) > 0, damped, jnp.eye(k))
    step = jax.scipy.linalg.solve(damped, sums.g, assume_a="pos")
    gain = jnp.sum(step * sums.g)
    # A is larger than z^T z by the part that holds the weights where they are; so is chance's gain smaller.
    chance = k / tokens * sums.energy / (1 + STAY)
    return step * jnp.where(gain > chance, 1 - chance / gain, 0)


def _product(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    return jnp.matmul(a, b, precision="highest")


@jax.jit(static_argnames="part")
def _pass_by(
    layer: DecoderLayer,
    linear: Linear,
    thresholds: Float[Array, "p"] | None,
    stream: Float[Array, "t d"],
    inputs: Float[Array, "t k"],
    part: str,
) -> tuple[Float[Array, "t d"], Float[Array, "t k2"]]:
    """The residual stream behind a projection, and the inputs of the one that follows in its layer."""
    read = Dense() if thresholds is None else Graded({ANY_LAYER: thresholds})
    outputs = read(ANY_LAYER, linear, inputs)
    match part:
        case "qkv":
            norms = None if layer.q_norm is None else (layer.q_norm.scale[...], layer.k_norm.scale[...])
            positions = jnp.arange(len(stream))[None]
            return stream, attend_heads(layer.config, outputs[None], norms, positions)[0][0]
        case "gate_up":
            return stream, swiglu(outputs)
        case "o":
            return stream + outputs, layer.post_norm(stream + outputs)
        case _:
            return stream + outputs, stream


@jax.jit
def _normed(norm: RMSNorm, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    return norm(x)
