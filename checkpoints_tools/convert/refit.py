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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.layer import WRITERS
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.model.apply import Dense, Graded
from grinqh_jax.model.attention import attend_heads
from grinqh_jax.model.decoder import DecoderLayer, RMSNorm
from grinqh_jax.model.linear import GradedLinear, Linear
from grinqh_jax.model.swiglu import swiglu
from pallas_kernels import Activations

BITS = 3.0
"""The setting of the dial that is fitted to: what is skipped at others is much the same."""

SHARE_OF_BITS = 0.75
"""At most so much of a code of few bits, or nothing would be skipped."""

STAY = 2.0
"""``c``: what the model at full precision counts for."""

DAMPING = 0.01
"""Added to the diagonal of A, in units of its mean."""

ANY_LAYER = "layer"
"""What every linear layer is called here, so that layers share their compiled programs."""


class Refit:
    """The calibration windows on their way through the layers, as in the original and graded.

    They stay on the device: every block of outputs is fitted to all of them.

    Args:
      hidden: hidden states ``[s, t, d]`` before the first layer.
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
        stream = [jnp.asarray(window) for window in hidden]
        self._exact, self._graded = _Windows(stream), _Windows(list(stream))
        self._factor_of: tuple[str, Float[Array, "k k"] | None] = "", None

    @property
    def streams(self) -> dict[str, Float[np.ndarray, "t d"]]:
        """The residual stream of each window, in the original and here; may be set, between two layers."""
        pairs = {"exact": self._exact, "graded": self._graded}.items()
        return {f"{kind} {s}": np.asarray(x) for kind, windows in pairs for s, x in enumerate(windows.stream)}

    @streams.setter
    def streams(self, streams: Mapping[str, Shaped[np.ndarray, "t d"]]) -> None:
        for kind, windows in {"exact": self._exact, "graded": self._graded}.items():
            for s, x in enumerate(windows.stream):  # A file does not tell that something is bfloat16.
                windows.stream[s] = jnp.asarray(streams[f"{kind} {s}"].view(x.dtype))

    def set_input_norm(self, norm: RMSNorm) -> None:
        """Goes to the projection behind a norm of the residual stream."""
        for windows in (self._exact, self._graded):
            windows.inputs = []  # or those of the projection before would be in memory beside the new ones
            windows.inputs = [_normed(norm, stream) for stream in windows.stream]

    def fitted(self, name: str, w: Float[Array, "k n"], outputs: slice) -> Float[Array, "k n"]:
        """The refitted weights of some outputs of the projection that the windows are before.

        Args:
          name: of the linear layer.
          w: the weights of these outputs.
          outputs: which they are.
        """
        least_read = self._thresholds(name)[0]
        lacking = [None] * len(self._exact.inputs)
        if name.rpartition(".")[2] in WRITERS:
            pairs = zip(self._exact.stream, self._graded.stream, strict=True)
            lacking = [exact[:, outputs] - graded[:, outputs] for exact, graded in pairs]
        windows = list(zip(self._exact.inputs, self._graded.inputs, lacking, strict=True))
        if self._factor_of[0] != name:  # All outputs have the same inputs.
            self._factor_of = name, factor(windows, least_read)
        return refitted(w, windows, least_read, self._factor_of[1])

    def advance(self, name: str, layer: DecoderLayer, linear: GradedLinear) -> None:
        """Takes the windows past a projection.

        Args:
          name: of the linear layer.
          layer: the original layer that it is in.
          linear: what it has become.
        """
        part = name.rpartition(".")[2]
        self._factor_of = "", None  # as large as all the states, and of no more use
        self._exact.advance(part, layer, getattr(layer, part), None)
        self._graded.advance(part, layer, linear, self._thresholds(name))

    def _thresholds(self, name: str) -> Float[Array, "p"]:
        return interpolate(jnp.asarray(self._tables[name]), self._targets, self._bits)


class _Windows:
    """Calibration windows before some projection.

    Attributes:
      stream: the residual stream of each.
      inputs: of the projection, likewise.
    """

    def __init__(self, stream: list[Float[Array, "t d"]]):
        self.stream = stream
        self.inputs: list[Float[Array, "t k"]] = []

    def advance(
        self, part: str, layer: DecoderLayer, linear: Linear, thresholds: Float[Array, "p"] | None
    ) -> None:
        """Takes the windows past ``part`` of a layer, computed by ``linear``."""
        for s, inputs in enumerate(self.inputs):
            found = _advance(layer, linear, thresholds, self.stream[s], inputs, part)
            # Waited for, or what many windows need on their way would be in memory at once.
            self.stream[s], self.inputs[s] = jax.block_until_ready(found)


def factor(windows: Sequence[tuple], least_read: Float[Array, ""] | float) -> Float[Array, "k k"] | None:
    """The Cholesky factor of ``A`` (see the module), damped; None with no more tokens than inputs.

    Args:
      windows, least_read: as in ``refitted``.
    """
    k = windows[0][0].shape[1]
    if _tokens(windows) <= k:  # All that could be gained would be chance.
        return None
    a = jnp.zeros((k, k))
    for exact, here, _ in windows:
        # One product after the other, and waited for: each is as large as A.
        a = _add_squares(a, here, least_read, 1.0).block_until_ready()
        a = _add_squares(a, exact, jnp.float32(0), STAY).block_until_ready()
    return _cholesky(a)


def refitted(
    w: Float[Array, "k n"],
    windows: Sequence[tuple],
    least_read: Float[Array, ""] | float,
    a_factor: Float[Array, "k k"] | None,
) -> Float[Array, "k n"]:
    """``W'`` (see the module), float32.

    Args:
      w: ``W``, or some of its columns.
      windows: of each window the exact inputs ``x [t, k]``, the inputs here ``[t, k]``, and what the outputs
        are to make up for, ``[t, n]`` or None.
      least_read: inputs here that are smaller in size are skipped.
      a_factor: of ``factor``; None leaves the weights as they are.
    """
    w = jnp.asarray(w, jnp.float32)
    if a_factor is None:
        return w
    g, energy = jnp.zeros(w.shape), jnp.zeros(())
    for exact, here, lacking in windows:
        g, energy = _add_residuals(g, energy, exact, here, lacking, least_read, w)
        energy.block_until_ready()
    return _moved(w, a_factor, g, energy, _tokens(windows))


def _tokens(windows: Sequence[tuple]) -> int:
    return sum(len(here) - first_scored_position(len(here)) for _, here, _ in windows)


def _counted(rows: Float[Array, "t k"], least_read: Float[Array, ""] | float) -> Float[Array, "t2 k"]:
    """The inputs that are read, zeros where they are skipped, of the positions that are counted."""
    rows = rows[first_scored_position(len(rows)) :].astype(jnp.float32)
    return jnp.where(jnp.abs(rows) < least_read, 0, rows)


@jax.jit(donate_argnums=0)
def _add_squares(
    a: Float[Array, "k k"],
    rows: Float[Array, "t k"],
    least_read: Float[Array, ""] | float,
    weight: Float[Array, ""] | float,
) -> Float[Array, "k k"]:
    rows = _counted(rows, least_read)
    return a + weight * _product(rows.T, rows)


@jax.jit(donate_argnums=0)
def _cholesky(a: Float[Array, "k k"]) -> Float[Array, "k k"]:
    damped = a + DAMPING * jnp.trace(a) / len(a) * jnp.eye(len(a))
    # A projection whose inputs are all zero has nothing to fit.
    return jnp.linalg.cholesky(jnp.where(jnp.trace(a) > 0, damped, jnp.eye(len(a))))


@jax.jit(donate_argnums=(0, 1))
def _add_residuals(
    g: Float[Array, "k n"],
    energy: Float[Array, ""],
    exact: Float[Array, "t k"],
    here: Float[Array, "t k"],
    lacking: Float[Array, "t n"] | None,
    least_read: Float[Array, ""] | float,
    w: Float[Array, "k n"],
) -> tuple[Float[Array, "k n"], Float[Array, ""]]:
    """Adds a window's to ``G`` and ``|y - z W|**2``."""
    x, z = _counted(exact, 0.0), _counted(here, least_read)
    residual = _product(x - z, w)
    if lacking is not None:
        residual += lacking[first_scored_position(len(here)) :].astype(jnp.float32)
    return g + _product(z.T, residual), energy + jnp.sum(residual**2)


@jax.jit
def _moved(
    w: Float[Array, "k n"],
    a_factor: Float[Array, "k k"],
    g: Float[Array, "k n"],
    energy: Float[Array, ""],
    tokens: Int[Array, ""] | int,
) -> Float[Array, "k n"]:
    """``W + A^-1 G``, the step shortened by the share of its gain that is chance."""
    step = jax.scipy.linalg.cho_solve((a_factor, True), g)
    gain = jnp.sum(step * g)
    # A is larger than z^T z by the part that holds the weights where they are; so is chance's gain smaller.
    chance = len(w) / tokens * energy / (1 + STAY)
    return w + step * jnp.where(gain > chance, 1 - chance / gain, 0)


def _product(a: Float[Array, "a b"], b: Float[Array, "b c"]) -> Float[Array, "a c"]:
    return jnp.matmul(a, b, precision="highest")


@jax.jit(static_argnames="part")
def _advance(
    layer: DecoderLayer,
    linear: Linear,
    thresholds: Float[Array, "p"] | None,
    stream: Float[Array, "t d"],
    inputs: Float[Array, "t k"],
    part: str,
) -> tuple[Float[Array, "t d"], Float[Array, "t k2"]]:
    """The residual stream behind a projection, and the inputs of the one that follows in its layer."""
    read = Dense() if thresholds is None else Graded({ANY_LAYER: thresholds})
    y = read(ANY_LAYER, linear, Activations.of(inputs))
    outputs = y.array
    match part:
        case "qkv":
            norms = None if layer.q_norm is None else (layer.q_norm.scale[...], layer.k_norm.scale[...])
            positions = jnp.arange(len(stream))[None]
            return stream, attend_heads(layer.config, y.reshape((1, -1)), norms, positions)[0].array[0]
        case "gate_up":
            return stream, swiglu(y).array
        case "o":
            return stream + outputs, layer.post_norm(stream + outputs)
        case _:
            return stream + outputs, stream


@jax.jit
def _normed(norm: RMSNorm, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    return norm(x)
