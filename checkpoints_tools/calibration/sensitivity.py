"""The sensitivity of the model's predictions to each output of each linear layer.

A small error ``d`` of a layer's outputs changes the predicted distribution by a divergence of
``E[(g . d)**2] / 2``, where ``g`` is the gradient, with respect to those outputs, of the log-likelihood of a
token drawn from the model's own prediction (the Fisher information; Amari 1998). If errors are uncorrelated
between outputs, that is ``sum_n E[g_n**2] E[d_n**2] / 2``. So ``E[g_n**2]`` is the weight of an output's
squared error, and weighted errors are comparable between layers.

One forward pass keeps the hidden states between the layers, and one backward pass uses them. The output
projection needs no backward pass. Each of its outputs needs a reliable sensitivity, so it gets more tokens.

Memory holds one layer and its backward pass: 2.4 GiB with the process for Qwen3-8B in float32, as on a CPU
(measured with two layers of its shape and one window). The states between the layers are in a file, because
they may need more memory than a layer: 2.4 GB for Qwen3-8B (36 layers x ``TOKENS`` x 4096 x 4 bytes). The
output projection is read in ranges of the vocabulary.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.head import (
    back_through_norm,
    logits,
    normed,
    outputs,
    vocabulary,
    with_logits,
)
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from checkpoints_tools.source.passes import before_mixture, each_group, mixture_of, of_mixture, pass_windows
from grinqh_jax.errors import CheckpointError
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import Apply, Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder_layer import DecoderLayer, RMSNorm
from grinqh_jax.model.experts import ChosenDense
from grinqh_jax.model.layer_spec import HEAD, Projection
from grinqh_jax.model.logit_transform import LogitTransform

TOKENS = 4096
"""Number of tokens for the decoder layers. The split of the bits averages them over a layer."""

HEAD_TOKENS = 16384
"""Number of tokens for the output projection, whose outputs are ordered by sensitivity."""


class ForwardStates:
    """States of the first windows on their way through the original model. A context manager.

    Attributes:
      behind: States behind the last layer, of about ``HEAD_TOKENS`` tokens.

    Args:
      directory: Directory of the file that holds the states before the layers; by default that of temporary
        files. The file has no name there, and is gone when the context ends.
      size: Bytes that the file will have (``states_bytes``).

    Raises:
      CheckpointError: The disk of the directory has less space.
    """

    def __init__(self, directory: Path | None = None, size: int = 0):
        directory = directory or Path(tempfile.gettempdir())
        if (free := shutil.disk_usage(directory).free) < size:
            raise CheckpointError(
                f"{directory}: hidden states need {size / 1e6:,.1f} MB of disk space for a while, and"
                f" {free / 1e6:,.1f} MB are free; free some space, or put --out on another disk"
            )
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed by ``__exit__``)
        self._dtype, self._shape = np.dtype(np.float32), (0, 0, 0)
        self.behind: Float[np.ndarray, "s t d"] | None = None

    def __enter__(self) -> "ForwardStates":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def add_layer(self, hidden: Float[np.ndarray, "s t d"]) -> None:
        """Writes the states before the next layer, of about ``TOKENS`` tokens.

        Raises:
          OSError: The disk is full.
        """
        before = hidden[: _whole_windows(TOKENS, hidden)]
        self._dtype, self._shape = before.dtype, before.shape
        self._file.write(before.tobytes())

    def take_layer(self) -> Float[np.ndarray, "s t d"]:
        """Returns the states that were written last, and forgets them."""
        states = np.empty(self._shape, self._dtype)
        start = self._file.seek(-states.nbytes, os.SEEK_END)
        self._file.readinto(states.view(np.uint8).data)
        self._file.seek(start)
        self._file.truncate()
        return states

    def finish(self, hidden: Float[np.ndarray, "s t d"]) -> None:
        """Copies the states behind the last layer."""
        self.behind = hidden[: _whole_windows(HEAD_TOKENS, hidden)].copy()


def states_bytes(config: ModelConfig, windows: Int32[np.ndarray, "s t"], compute_dtype) -> int:
    """Returns the bytes of the file of ``ForwardStates`` for windows of token ids."""
    tokens = windows[: _whole_windows(TOKENS, windows)].size
    return config.num_layers * tokens * config.hidden_size * jnp.dtype(compute_dtype).itemsize


def _whole_windows(tokens: int, windows: np.ndarray) -> int:
    return max(tokens // windows.shape[1], 1)


def run_forward(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    compute_dtype,
    states: ForwardStates,
    on_progress: Callable[[str], None] = lambda note: None,
) -> None:
    """Runs windows through the model, one layer in memory.

    Args:
      source, compute_dtype: See ``output_sensitivities``.
      windows: Token ids.
      states: Receives the states of the windows.
      on_progress: Called with a note after each layer.
    """
    hidden = embed(source, windows[: _whole_windows(HEAD_TOKENS, windows)], compute_dtype)
    for i in range(source.config.num_layers):
        layer = dense_layer(source, i, *read_layer(source, i, experts=False), compute_dtype)
        states.add_layer(hidden)
        pass_windows(layer, hidden, each_group(source, i, layer))
        del layer  # Frees it before the next one is read.
        on_progress(f"forward layers.{i}")
    states.finish(hidden)


def output_sensitivities(
    source: HFCheckpoint,
    compute_dtype,
    *,
    states: ForwardStates,
    axes: Float[np.ndarray, "d d"] | None = None,
    on_progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Estimates ``E[g_n**2]`` of every output of every linear layer.

    Args:
      source: Checkpoint.
      compute_dtype: Dtype of the hidden states.
      states: States of a forward pass over windows of token ids, freed on the way. Of the windows the first
        ``TOKENS`` or ``HEAD_TOKENS`` tokens are used, in whole windows, at least one window.
      axes: Orthogonal ``Q``. Outputs that are added to the residual stream are measured along its columns.
      on_progress: Called with a note after each layer.

    Returns:
      Sensitivities by projection (``layers.0.qkv``), and those of the whole vocabulary under ``HEAD``. All
      experts of a layer share the sensitivities of their outputs, which are means over the chosen experts.
    """
    config = source.config
    device_axes = None if axes is None else jnp.asarray(axes)
    norm = RMSNorm(jnp.asarray(source.read(f"{config.final_norm.name}.scale")), config.rms_norm_eps)
    hidden, states.behind = states.behind, None
    assert hidden is not None, "the forward pass is finished"
    sensitivities = {HEAD: _head_variances(source, norm, hidden)}
    gradients = _head_gradients(source, norm, hidden[: _whole_windows(TOKENS, hidden)])
    del hidden
    for i in reversed(range(config.num_layers)):
        layer = dense_layer(source, i, *read_layer(source, i, experts=False), compute_dtype)
        groups = each_group(source, i, layer)
        sums = _back_through(layer, groups, states.take_layer(), gradients, device_axes)
        sensitivities |= {f"layers.{i}.{name}": sums[name] / len(gradients) for name in sums}
        del layer
        on_progress(f"backward layers.{i}")
    return sensitivities


def _back_through(
    layer: DecoderLayer,
    groups: Iterable[Any],
    before: Float[np.ndarray, "s t d"],
    gradients: Float[np.ndarray, "s t d"],
    axes: jax.Array | None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Returns the sums over the windows of ``_layer_gradients``' mean squares, by projection.

    Args:
      layer: Dense layer without experts.
      groups: ``passes.each_group`` of the layer.
      before: States before the layer.
      gradients: Gradients behind the layer; replaced by those before it.
      axes: See ``output_sensitivities``.
    """
    sums: dict[str, Any] = dict.fromkeys(layer.spec.names, 0.0)

    def add(squares: dict[str, Array]) -> None:
        for name, square in squares.items():
            sums[name] = sums[name] + np.asarray(square, np.float64)

    if mixture_of(layer) is not None:
        streams = [np.asarray(_stream_before_mixture(layer, window)) for window in before]
        behind = gradients.copy()
        for _ in groups:
            for stream, gradient, total in zip(streams, behind, gradients, strict=True):
                back, squares = _layer_gradients(layer, stream, gradient, axes, of_mixture)
                total += np.asarray(back)
                add(squares)
    for window, gradient in zip(before, gradients, strict=True):
        back, squares = _layer_gradients(layer, window, gradient, axes, before_mixture)
        gradient[...] = back
        add(squares)
    return sums


@jax.jit
def _stream_before_mixture(layer: DecoderLayer, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    return before_mixture(layer, x, Dense())


class _Perturbed(Dense):
    """An ``apply`` strategy that adds a given array to the outputs of each projection."""

    def __init__(self, added: dict[str, Float[Array, "b t *experts n"]]):
        self.added = added

    def product(self, name: str, linear, x: Float[Array, "b t *experts k"]) -> Float[Array, "b t *experts n"]:
        added = self.added[name.rpartition(".")[2]]
        if isinstance(linear, ChosenDense) and linear.is_held is not None:
            added = jnp.where(linear.is_held[..., None], added, 0)
        return super().product(name, linear, x) + added


@partial(jax.jit, static_argnames="part")
def _layer_gradients(
    layer: DecoderLayer,
    x: Float[Array, "t d"],
    gradient: Float[Array, "t d"],
    axes: jax.Array | None,
    part: Callable[[DecoderLayer, Float[Array, "t d"], Apply], Float[Array, "t d"]],
) -> tuple[Float[Array, "t d"], dict[str, Float[Array, "n"]]]:
    """Returns the gradient before a part of a layer, and mean squares of those at its projections' outputs.

    The part is ``before_mixture`` or ``of_mixture``. Means are over all experts of a token; those that the
    layer does not hold count as zeros.
    """

    def run(x, added):
        return part(layer, x, _Perturbed(added))

    def zeros_of(projection: Projection) -> Float[Array, "1 t *experts n"]:
        mixture = layer.spec.experts
        rows = (mixture.rows,) if projection.of_experts and mixture is not None else ()
        return jnp.zeros((1, len(x), *rows, getattr(layer, projection.name).out_features), x.dtype)

    projections = [p for p in layer.spec.projections if p.of_experts == (part is of_mixture)]
    zeros = {projection.name: zeros_of(projection) for projection in projections}
    _, pull_back = jax.vjp(run, x, zeros)
    back, at_outputs = pull_back(gradient)
    if axes is not None:
        at_outputs |= {name: at_outputs[name] @ axes for name in layer.spec.writers if name in at_outputs}
    return back, {name: _mean_square(g[0]) for name, g in at_outputs.items()}


def _mean_square(gradient: Float[Array, "t *experts n"]) -> Float[Array, "n"]:
    # The first positions have activations and gradients unlike all others (``dial.SKIPPED_POSITIONS``).
    scored = gradient[first_scored_position(len(gradient)) :].reshape(-1, gradient.shape[-1])
    return jnp.mean(scored.astype(jnp.float32) ** 2, axis=0)


def _head_variances(
    source: HFCheckpoint, norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]
) -> Float[np.ndarray, "v"]:
    """Returns ``E[g_n**2]`` at the outputs, exact over all tokens: the mean of ``p (1 - p)`` for logits.

    If a function of the outputs gives the logits, the square of its derivative is a factor.

    Reads the vocabulary twice: for the log-normaliser of each prediction, and for the sums.
    """
    first = first_scored_position(hidden.shape[1])
    scored = np.stack([np.asarray(normed(norm, window))[first:] for window in hidden])
    transform = source.config.logit_transform
    normaliser = np.full(scored.shape[:2], -np.inf, np.float32)
    for _, w in vocabulary(source, scored.shape[1]):
        for window, x in zip(normaliser, scored, strict=True):
            window[...] = _normaliser(window, x, w, transform)
    sums = []
    for _, w in vocabulary(source, scored.shape[1]):
        windows = zip(normaliser, scored, strict=True)
        ranges = (_variances(window, x, w, transform) for window, x in windows)
        sums.append(sum(np.asarray(variances, np.float64) for variances in ranges))
    return np.concatenate(sums) / normaliser.size


def _head_gradients(
    source: HFCheckpoint, norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]
) -> Float[np.ndarray, "s t d"]:
    """Returns gradients, at the outputs of the last layer, of the log-likelihood of a sampled token."""
    rows = jnp.asarray(hidden.reshape(-1, hidden.shape[2]))
    behind = normed(norm, rows)
    transform = source.config.logit_transform
    # Log-normaliser of each prediction, and a token sampled from it: the largest logit plus Gumbel noise.
    sampled = tuple(jnp.full(len(rows), fill) for fill in (-jnp.inf, -jnp.inf, 0))
    for start, w in vocabulary(source, len(rows)):
        sampled = jax.block_until_ready(_sample(*sampled, behind, w, start, transform))
    normaliser, _, token = sampled
    gradient = jnp.zeros(behind.shape, jnp.float32)
    for start, w in vocabulary(source, len(rows)):
        arguments = normaliser, token, behind, w, start, gradient, transform
        gradient = _add_gradient(*arguments).block_until_ready()
    return np.array(back_through_norm(norm, rows, gradient)).reshape(hidden.shape)


@partial(jax.jit, static_argnames="transform")
def _normaliser(
    normaliser: Float[Array, "t"],
    behind: Float[Array, "t d"],
    w: Float[Array, "d n"],
    transform: LogitTransform,
) -> Float[Array, "t"]:
    return with_logits(normaliser, logits(behind, w, transform))


@partial(jax.jit, static_argnames="transform")
def _variances(
    normaliser: Float[Array, "t"],
    behind: Float[Array, "t d"],
    w: Float[Array, "d n"],
    transform: LogitTransform,
) -> Float[Array, "n"]:
    """Returns the sums of ``p (1 - p)`` over the positions, times the square of the derivative."""
    raw = outputs(behind, w)
    probabilities = jnp.exp(transform(raw) - normaliser[:, None])
    return jnp.sum(probabilities * (1 - probabilities) * transform.derivative(raw) ** 2, axis=0)


@partial(jax.jit, static_argnames="transform")
def _sample(
    normaliser: Float[Array, "t"],
    best: Float[Array, "t"],
    token: Int[Array, "t"],
    behind: Float[Array, "t d"],
    w: Float[Array, "d n"],
    start: Int[Array, ""],
    transform: LogitTransform,
) -> tuple[Float[Array, "t"], Float[Array, "t"], Int[Array, "t"]]:
    """Updates the log-normaliser and the sampled token with a range of the vocabulary, from ``start`` on."""
    scores = logits(behind, w, transform)
    noisy = scores + jax.random.gumbel(jax.random.fold_in(jax.random.key(0), start), scores.shape)
    better = noisy.max(axis=-1) > best
    return (
        with_logits(normaliser, scores),
        jnp.where(better, noisy.max(axis=-1), best),
        jnp.where(better, start + jnp.argmax(noisy, axis=-1), token),
    )


@partial(jax.jit, static_argnames="transform")
def _add_gradient(
    normaliser: Float[Array, "t"],
    token: Int[Array, "t"],
    behind: Float[Array, "t d"],
    w: Float[Array, "d n"],
    start: Int[Array, ""],
    gradient: Float[Array, "t d"],
    transform: LogitTransform,
) -> Float[Array, "t d"]:
    """Adds the share of a range of the vocabulary to the gradient at the inputs of the output projection."""
    raw = outputs(behind, w)
    probabilities = jnp.exp(transform(raw) - normaliser[:, None])
    change = (token[:, None] == start + jnp.arange(w.shape[1])) - probabilities
    return gradient + jnp.matmul(change * transform.derivative(raw), w.T.astype(jnp.float32))
