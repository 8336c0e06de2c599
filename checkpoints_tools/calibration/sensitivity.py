"""How much the model's predictions depend on each output of each linear layer.

A small error ``d`` of a layer's outputs changes the predicted distribution by a divergence of
``E[(g . d)**2] / 2``, where ``g`` is the gradient, with respect to those outputs, of the log-likelihood of
a token drawn from the model's own prediction (the Fisher information; Amari 1998). With errors that are
uncorrelated between outputs that is ``sum_n E[g_n**2] E[d_n**2] / 2``, so ``E[g_n**2]`` is what an output's
squared error is to be weighted by, and errors so weighted are comparable between layers.

One pass forward, which keeps the hidden states between the layers, and one back. The output projection needs
no way back, and one number for each token of the vocabulary that means something: it gets more tokens.

Memory holds one layer, and the states of a few thousand tokens. In float32, as on a CPU, Qwen3-8B takes some
5 GiB: 2.3 of states (36 layers x ``TOKENS`` x 4096 x 4 bytes), 2.4 for a layer and its way back, the process
itself included (measured with two layers of its shape and one window). The vocabulary goes by in blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.source.head import logits, vocabulary, with_logits
from checkpoints_tools.source.layer import WRITERS, dense_layer, embed, read_layer, run_layer
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import HEAD, Dense
from grinqh_jax.model.decoder import LAYER_LINEARS, DecoderLayer, RMSNorm

TOKENS = 4096
"""Enough: what is wanted is one number an output, averaged over a layer when bits are split."""

HEAD_TOKENS = 16384
"""For the output projection, whose outputs are ordered by what is found."""


def output_sensitivities(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    compute_dtype,
    *,
    axes: Float[np.ndarray, "d d"] | None = None,
    done: Callable[[str], None] = lambda part: None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """``E[g_n**2]`` of every output of every linear layer, by name.

    Args:
      source: the checkpoint.
      windows: token ids; as many are used as make ``TOKENS`` tokens, or ``HEAD_TOKENS``, at least one.
      compute_dtype: of the hidden states.
      axes: orthogonal ``Q``: outputs that are added to the residual stream are counted along its columns.
      done: called after each layer of each of the two passes, with its name.
    """
    config = source.config
    way_back, all_windows = (max(tokens // windows.shape[1], 1) for tokens in (TOKENS, HEAD_TOKENS))
    hidden = embed(source, windows[:all_windows], compute_dtype)
    states = []
    for i in range(config.num_layers):
        layer = dense_layer(source, *read_layer(source, i), compute_dtype)
        states.append(hidden[:way_back].copy())
        for window in hidden:
            window[...] = run_layer(layer, window)
        del layer  # or it would be in memory beside the next one
        done(f"forward {i}")
    axes = None if axes is None else jnp.asarray(axes)
    norm = RMSNorm(jnp.asarray(source.read("norm.scale")), config.rms_norm_eps)
    found = {HEAD: _head_variances(source, norm, hidden)}
    gradients = _head_gradients(source, norm, hidden[:way_back])
    del hidden
    for i in reversed(range(config.num_layers)):
        layer = dense_layer(source, *read_layer(source, i), compute_dtype)
        sums: dict[str, np.ndarray] = dict.fromkeys(LAYER_LINEARS, np.float64(0))
        for window, gradient in zip(states.pop(), gradients, strict=True):
            back, squares = _layer_gradients(layer, window, gradient, axes)
            gradient[...] = back
            sums = {part: sums[part] + np.asarray(squares[part], np.float64) for part in LAYER_LINEARS}
        found |= {f"layers.{i}.{part}": sums[part] / len(gradients) for part in LAYER_LINEARS}
        del layer
        done(f"backward {i}")
    return found


class _Perturbed(Dense):
    """An ``apply`` strategy that adds a given array to the outputs of each layer, by part."""

    def __init__(self, added: dict[str, Float[Array, "b t n"]]):
        self.added = added

    def product(self, name: str, linear, x: Float[Array, "b t k"]) -> Float[Array, "b t n"]:
        return super().product(name, linear, x) + self.added[name.rpartition(".")[2]]


@jax.jit
def _layer_gradients(
    layer: DecoderLayer, x: Float[Array, "t d"], gradient: Float[Array, "t d"], axes: jax.Array | None
) -> tuple[Float[Array, "t d"], dict[str, Float[Array, "n"]]]:
    """From the gradient behind a layer to that before it, and the mean squares at its linears' outputs."""

    def run(x, added):
        return layer("layer", x[None], jnp.arange(len(x))[None], _Perturbed(added))[0][0]

    outputs = {part: getattr(layer, part).out_features for part in LAYER_LINEARS}
    nothing = {part: jnp.zeros((1, len(x), n), x.dtype) for part, n in outputs.items()}
    _, pull_back = jax.vjp(run, x, nothing)
    back, inner = pull_back(gradient)
    if axes is not None:
        inner |= {part: inner[part] @ axes for part in WRITERS}
    return back, {part: _mean_square(g[0]) for part, g in inner.items()}


def _mean_square(gradient: Float[Array, "t n"]) -> Float[Array, "n"]:
    # The first positions have activations and gradients like no others (``engine.SKIPPED_POSITIONS``).
    counted = gradient[first_scored_position(len(gradient)) :]
    return jnp.mean(counted.astype(jnp.float32) ** 2, axis=0)


def _head_variances(
    source: HFCheckpoint, norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]
) -> Float[np.ndarray, "v"]:
    """``E[g_n**2]`` at the logits: the mean of ``p (1 - p)``, over all tokens that could have been drawn.

    The vocabulary goes by in blocks, once for each prediction's log-normaliser and once for the sum.
    """
    counted = hidden[:, first_scored_position(hidden.shape[1]) :]
    normaliser = np.full(counted.shape[:2], -np.inf, np.float32)
    for _, w in vocabulary(source, counted.shape[1]):
        for window, x in zip(normaliser, counted, strict=True):
            window[...] = _normaliser(window, norm(x), w)
    sums = []
    for _, w in vocabulary(source, counted.shape[1]):
        windows = zip(normaliser, counted, strict=True)
        sums.append(sum(np.asarray(_variances(window, norm(x), w), np.float64) for window, x in windows))
    return np.concatenate(sums) / normaliser.size


def _head_gradients(
    source: HFCheckpoint, norm: RMSNorm, hidden: Float[np.ndarray, "s t d"]
) -> Float[np.ndarray, "s t d"]:
    """Behind the last layer: the gradients of the log-likelihood of a token drawn at each position."""
    rows = jnp.asarray(hidden.reshape(-1, hidden.shape[2]))
    normed, pull_back = jax.vjp(norm, rows)
    # Log-normaliser of each prediction, and a token drawn from it: the largest of logit + Gumbel noise.
    drawn = tuple(jnp.full(len(rows), fill) for fill in (-jnp.inf, -jnp.inf, 0))
    for start, w in vocabulary(source, len(rows)):
        drawn = jax.block_until_ready(_draw(*drawn, normed, w, start))
    normaliser, _, token = drawn
    gradient = jnp.zeros(normed.shape, jnp.float32)
    for start, w in vocabulary(source, len(rows)):
        gradient = _share_of_gradient(normaliser, token, normed, w, start, gradient).block_until_ready()
    (gradient,) = pull_back(gradient.astype(normed.dtype))
    return np.array(gradient).reshape(hidden.shape)


@jax.jit
def _normaliser(
    normaliser: Float[Array, "t"], normed: Float[Array, "t d"], w: Float[Array, "d n"]
) -> Float[Array, "t"]:
    return with_logits(normaliser, logits(normed, w))


@jax.jit
def _variances(
    normaliser: Float[Array, "t"], normed: Float[Array, "t d"], w: Float[Array, "d n"]
) -> Float[Array, "n"]:
    """Sums of ``p (1 - p)`` over the positions."""
    probabilities = jnp.exp(logits(normed, w) - normaliser[:, None])
    return jnp.sum(probabilities * (1 - probabilities), axis=0)


@jax.jit
def _draw(
    normaliser: Float[Array, "t"],
    best: Float[Array, "t"],
    token: Int[Array, "t"],
    normed: Float[Array, "t d"],
    w: Float[Array, "d n"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "t"], Float[Array, "t"], Int[Array, "t"]]:
    """Takes the block of the vocabulary from ``start`` on into account."""
    here = logits(normed, w)
    noisy = here + jax.random.gumbel(jax.random.fold_in(jax.random.key(0), start), here.shape)
    better = noisy.max(axis=-1) > best
    return (
        with_logits(normaliser, here),
        jnp.where(better, noisy.max(axis=-1), best),
        jnp.where(better, start + jnp.argmax(noisy, axis=-1), token),
    )


@jax.jit
def _share_of_gradient(
    normaliser: Float[Array, "t"],
    token: Int[Array, "t"],
    normed: Float[Array, "t d"],
    w: Float[Array, "d n"],
    start: Int[Array, ""],
    gradient: Float[Array, "t d"],
) -> Float[Array, "t d"]:
    """Adds what a block of the logits has to do with the gradient at their input."""
    probabilities = jnp.exp(logits(normed, w) - normaliser[:, None])
    change = (token[:, None] == start + jnp.arange(w.shape[1])) - probabilities
    return gradient + jnp.matmul(change, w.T.astype(jnp.float32))
