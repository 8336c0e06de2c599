"""Trials that choose codes, scales and norms by the error of graded reading.

Weights are not refitted, and level gains are fitted, so nothing else compensates for the errors of codes.

The first three treat a channel as five inputs, one per level: ``x_j [level_j = l]``. Each has its own error,
and one nested code serves all of them. Their second moments are measured at the thresholds that give the
layer alone a mean of ``BITS``. The output projection is rounded as in the product.

* ``expanded-gptq``: GPTQ (``checkpoints_tools.baselines.gptq``) on these inputs. The code of a channel rounds
  the mean of the targets of its levels, weighted by energy. Later channels compensate for its errors.
* ``expanded-gptq-least``: the code with the least cost of the five errors among those near that code.
* ``coordinate-descent``: ``SWEEPS`` passes over all channels from plain codes. Each weight takes the nearby
  code with the least error of the output.

The others train the plainly rounded model to minimize the sum of the logarithms of the divergences at
``SETTINGS``. Thresholds and gains stay fixed; the gradient treats the levels as constants.

* ``trained-codes``: trains the codes of all layers with a straight-through gradient: the gradient of a
  rounded weight, at any level, is that of the weight. ``trained-codes-fast`` takes larger steps.
* ``trained-scales-and-norms``: trains a factor for each scale and each element of each norm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from flax.traverse_util import unflatten_dict
from trial import PLAIN_WEIGHTS, Trial, patched, rounded

from checkpoints_tools.calibration import statistics as calibration
from checkpoints_tools.calibration.allocation import GradedCosts, threshold_tables
from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert.train_gains import SECOND_MOMENT_DECAY, training_windows
from checkpoints_tools.quantizers import RoundedWeight, rtn
from grinqh_jax.checkpoint import Loaded, Writer, load
from grinqh_jax.decoding.thresholds import interpolate
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.decoder import Decoder, checkpoint_leaves, linear_names
from pallas_kernels import codes, grading, layout

BITS, DAMPING, SWEEPS = 3.0, 0.01, 3
LEVELS = 5
"""Number of levels of a channel, level 0 included."""

AROUND = np.array([0] + [sign * n * step for step in (1, 4, 16) for n in (1, 2, 3) for sign in (1, -1)])
"""Differences from a code to the codes near it: a few steps of its last three digits."""

DIGITS = (np.arange(256)[:, None] >> (6 - 2 * np.arange(LEVELS - 1))) & 3
VALUES = np.cumsum((DIGITS - codes.DIGIT_MEAN) * 4.0 ** -np.arange(LEVELS - 1), axis=1)
VALUES = np.concatenate([np.zeros((256, 1)), VALUES], axis=1).astype(np.float32)
"""Value of each code at each level, in units of the scale, ``[256, LEVELS]``."""

SETTINGS, STEPS = (1.5, 2.0, 3.0, 4.0, 8.0), 64


class _Expanded(Dense):
    """An ``apply`` strategy that collects second moments of the inputs by level in ``moments``."""

    def __init__(self, thresholds: dict[str, jax.Array]):
        self.thresholds, self.moments = thresholds, {}

    def product(self, name: str, linear, x):
        projection = name.rpartition(".")[2]
        rows = x[0, first_scored_position(x.shape[1]) :]
        at = grading.levels(rows, self.thresholds[projection])[..., None] == jnp.arange(LEVELS)
        rows = jnp.where(at, rows[..., None], 0).reshape(len(rows), -1)
        self.moments[projection] = rows.T @ rows / len(rows)
        return super().product(name, linear, x)


@jax.jit
def _run(layer, x, thresholds):
    expanded = _Expanded(thresholds)
    return layer("layer", x, jnp.arange(x.shape[1])[None], expanded)[0], expanded.moments


def rounded_by(quantizer):
    """Returns a ``change`` that rounds layers with ``quantizer(w, Hessian)`` to 8-bit codes ``[K, N]``."""
    through_layer = calibration.through_layer

    def with_moments(layer, hidden):
        before = hidden.copy()
        inputs = through_layer(layer, hidden)
        thresholds = {name: _thresholds(getattr(layer, name).kernel[...], inputs[name]) for name in inputs}
        totals = dict.fromkeys(layer.spec.names, 0)
        for window in before:
            moments = _run(layer, window[None], thresholds)[1]
            totals = jax.block_until_ready({name: totals[name] + moments[name] for name in totals})
        for name, total in totals.items():
            inputs[name].moments = total / len(before)
        return inputs

    def quantize(w: jax.Array, seen, *, name: str) -> RoundedWeight:
        if not hasattr(seen, "moments"):
            return rtn(w, seen, name=name)
        damping = DAMPING * jnp.mean(jnp.diagonal(seen.moments)) * jnp.eye(len(seen.moments))
        rounded_codes = quantizer(w, seen.moments + damping).astype(jnp.uint8)
        return RoundedWeight(rounded_codes, codes.max_abs_scales(w))

    return rounded(with_moments, quantize)


def _thresholds(w: jax.Array, seen) -> jax.Array:
    errors = np.asarray(codes.level_errors(w, codes.quantize(w)), np.float64)
    alone = {"layer": GradedCosts(seen.counts, errors, w.size)}
    return jnp.asarray(threshold_tables(alone, (BITS, 8.0))["layer"][0])


def expanded_gptq(around: np.ndarray, w: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns the codes of ``expanded-gptq``; ``around`` has the differences to the allowed codes."""
    # ``H^-1 = U^T U`` with an upper U, which is the inverse of V in ``H = V V^T``, upper, too.
    flipped = np.asarray(hessian, np.float64)[::-1, ::-1]
    factor, one = np.linalg.cholesky(flipped), np.eye(len(flipped))
    upper = scipy.linalg.solve_triangular(factor, one, lower=True)[::-1, ::-1]
    blocks = np.stack([upper[i : i + LEVELS, i : i + LEVELS] for i in range(0, len(upper), LEVELS)])
    whitening = np.linalg.inv(blocks).transpose(0, 2, 1)
    energies = np.asarray(jnp.diagonal(hessian)).reshape(-1, LEVELS).copy()
    energies[:, 0] = 0  # no code reduces the error of a skipped channel
    shares = energies / energies.sum(axis=1, keepdims=True)
    arrays = [jnp.asarray(array, jnp.float32) for array in (upper, whitening, shares)]
    return _compensated(w, codes.max_abs_scales(w), *arrays, jnp.asarray(around))


@jax.jit
def _compensated(w, scales, upper, whitening, shares, around):
    """Returns codes ``[K, N]``; each channel compensates for the errors of earlier ones."""

    def step(i, state):
        targets, chosen = state
        desired = jax.lax.dynamic_slice_in_dim(targets, LEVELS * i, LEVELS)
        scale = scales[i // layout.GROUP].astype(jnp.float32)
        plain = codes.encode((shares[i] @ desired)[None], scale[None]).astype(jnp.int32)
        candidates = jnp.clip(plain + around[:, None], 0, 255)
        errors = desired.T - jnp.asarray(VALUES)[candidates] * scale[:, None]  # [candidates, N, levels]
        white = errors @ whitening[i].T
        best = jnp.argmin(jnp.sum(white**2, axis=-1), axis=0)[None]
        white = jnp.take_along_axis(white, best[..., None], axis=0)[0]
        rows = jax.lax.dynamic_slice_in_dim(upper, LEVELS * i, LEVELS)
        later = jnp.where(jnp.arange(len(targets)) >= LEVELS * (i + 1), rows, 0)
        code = jnp.take_along_axis(candidates, best, axis=0)[0]
        return targets - later.T @ white.T, chosen.at[i].set(code)

    start = jnp.repeat(w, LEVELS, axis=0), jnp.zeros(w.shape, jnp.int32)
    return jax.lax.fori_loop(0, len(w), step, start)[1]


@jax.jit
def coordinate_descent(w: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns the codes of ``coordinate-descent``.

    The levels of a channel exclude each other, so ``hessian`` is diagonal within a channel.
    """
    scales = codes.max_abs_scales(w)
    values = jnp.asarray(VALUES)
    diagonal = jnp.diagonal(hessian).reshape(-1, LEVELS)

    def step(turn, state):
        chosen, errors = state
        i = turn % len(w)
        scale = scales[i // layout.GROUP].astype(jnp.float32)
        errors_i = jax.lax.dynamic_slice_in_dim(errors, LEVELS * i, LEVELS)
        gradient = jax.lax.dynamic_slice_in_dim(hessian, LEVELS * i, LEVELS) @ errors
        candidates = jnp.clip(chosen[i] + jnp.asarray(AROUND)[:, None], 0, 255)
        change = w[i][:, None] - values[candidates] * scale[:, None] - errors_i.T
        cost = jnp.sum(2 * gradient.T * change + diagonal[i] * change**2, axis=-1)
        best = jnp.argmin(cost, axis=0)[None]
        errors_i += jnp.take_along_axis(change, best[..., None], axis=0)[0].T
        code = jnp.take_along_axis(candidates, best, axis=0)[0]
        return chosen.at[i].set(code), jax.lax.dynamic_update_slice_in_dim(errors, errors_i, LEVELS * i, 0)

    plain = codes.encode(w, scales).astype(jnp.int32)
    scale = jnp.repeat(scales.astype(jnp.float32), layout.GROUP, axis=0)[: len(w)]
    errors = (w[..., None] - values[plain] * scale[..., None]).transpose(0, 2, 1).reshape(-1, w.shape[1])
    return jax.lax.fori_loop(0, SWEEPS * len(w), step, (plain, errors))[0]


def trained(rate: float, *kinds: str):
    """Returns a ``change`` that trains "weights", "scales" or "norms" of the model before the measurement.

    A step of Adam changes a weight by about ``rate`` scales, of which the last digit's step is 1 / 64, or the
    logarithm of a factor by ``rate``. In the second half, the rate falls to 0.
    """
    ordinary = convert.main

    def convert_and_train(argv: Sequence[str]) -> int:
        args = convert.parser().parse_args(argv)
        start = args.out.with_name("rtn")  # the model of the trial "rtn"
        if not start.exists() and (code := ordinary([*argv, "--out", str(start)])):
            return code
        source, loaded = open_checkpoint(args.model), load(start)
        calib = read_calibration(source, [args.calib], args.tokens)
        windows = training_windows(calib.windows, STEPS * len(SETTINGS))
        leaves = checkpoint_leaves(loaded.model)
        adam = optax.adam(optax.linear_schedule(rate, 0, STEPS // 2, STEPS // 2), b2=SECOND_MOMENT_DECAY)
        trained_values = _train(kinds, adam, load_decoder(source, jnp.float32), loaded, leaves, windows)
        with Writer(args.out, fingerprint=args.out.name) as writer:
            writer.save_part(
                "all", unflatten_dict(leaves | _stored(loaded.model, leaves, trained_values), sep=".")
            )
            writer.finalize(source.hf_config, loaded.quantization, source.companions)
        return 0

    return patched((convert, "main", convert_and_train))


def _train(kinds: Sequence[str], adam, original: Decoder, loaded: Loaded, leaves: Mapping, windows):
    """Trains the parameters of ``kinds``; returns weights in scales, and log factors of scales and norms."""
    stored = {name: loaded.model.linear(name).weight for name in linear_names(loaded.config)}
    ones = {name: jnp.ones_like(w.scales) for name, w in stored.items()}
    fixed = {
        "weights": {n: codes.dequantize(dataclasses.replace(w, scales=ones[n])) for n, w in stored.items()},
        "scales": {name: jnp.zeros(one.shape) for name, one in ones.items()},
        "norms": {name: jnp.zeros(leaf.shape) for name, leaf in leaves.items() if name.endswith(".scale")},
    }
    trained_values = {kind: fixed.pop(kind) for kind in kinds}
    state = adam.init(trained_values)
    targets = jnp.asarray(loaded.quantization.targets, jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def gradient(trained_values, fixed, leaves, bits, tokens, exact):
        parameters = trained_values | fixed
        norms = {name: leaves[name] * jnp.exp(factors) for name, factors in parameters["norms"].items()}
        model = Decoder.from_tree(loaded.config, unflatten_dict(leaves | norms, sep="."), jnp.float32)
        graded = jax.nn.log_softmax(model(tokens[None], _Trained(parameters, targets, bits))[0])
        lost = jnp.sum(jnp.exp(exact) * (exact - graded), axis=-1)
        return jnp.log(jnp.mean(lost[first_scored_position(len(tokens)) :]))

    predict = jax.jit(lambda original, tokens: jax.nn.log_softmax(original(tokens[None])[0]))
    for step in range(STEPS):
        total = jax.tree.map(jnp.zeros_like, trained_values)
        for s, bits in enumerate(SETTINGS):
            tokens = jnp.asarray(windows[(step * len(SETTINGS) + s) % len(windows)])
            lost, gradients = gradient(trained_values, fixed, leaves, bits, tokens, predict(original, tokens))
            total = jax.tree.map(jnp.add, total, gradients)
            print(f"step {step}, {bits} bits: {np.exp(lost):.3g}", flush=True)
        updates, state = adam.update(total, state)
        trained_values = optax.apply_updates(trained_values, updates)
    return trained_values | fixed


class _Trained(Dense):
    """An ``apply`` strategy that grades with the trained parameters instead of codes and scales."""

    def __init__(self, parameters: Mapping, targets: jax.Array, bits: jax.Array):
        self.parameters, self.dial = parameters, (targets, bits)

    def product(self, name: str, linear, x):
        level = grading.levels(x, interpolate(linear.thresholds[...], *self.dial))
        weights = self.parameters["weights"][name]
        scales = _scales(linear, self.parameters["scales"][name])
        scales = jnp.repeat(scales, layout.GROUP, axis=0)[: linear.in_features, : linear.out_features]
        total = 0
        for index in range(1, LEVELS):
            width = 4.0 ** (1 - index)
            inside = jnp.clip(weights, -codes.RANGE, codes.RANGE - 1 / codes.CODE_STEPS)
            middle = (jnp.floor((inside + codes.RANGE) / width) + 0.5) * width - codes.RANGE
            read = weights + jax.lax.stop_gradient(middle - weights)
            inputs = jnp.where(level == index, x * linear.level_gains[...][index - 1], 0)
            total += inputs @ (read * scales)
        return total


def _scales(linear, factors: jax.Array) -> jax.Array:
    return linear.scales[...] * jnp.exp(factors)


def _stored(model: Decoder, leaves: Mapping, trained_values: Mapping) -> dict[str, jax.Array]:
    """Returns the leaves that training changed, in the format of a checkpoint."""
    stored = {}
    for name, weights in trained_values["weights"].items():
        linear = model.linear(name)
        scales = _scales(linear, trained_values["scales"][name])[:, : linear.out_features].astype(jnp.float16)
        weight = codes.from_codes(codes.encode(weights, jnp.ones_like(scales)), scales)
        stored |= {f"{name}.planes": weight.planes, f"{name}.scales": weight.scales}
    norms = trained_values["norms"].items()
    return stored | {n: (leaves[n] * jnp.exp(factor)).astype(leaves[n].dtype) for n, factor in norms}


CODE_TRIALS = {
    "expanded-gptq": Trial("expanded GPTQ", PLAIN_WEIGHTS, rounded_by(partial(expanded_gptq, AROUND[:1]))),
    "expanded-gptq-least": Trial(
        "expanded GPTQ, codes of least error", PLAIN_WEIGHTS, rounded_by(partial(expanded_gptq, AROUND))
    ),
    "coordinate-descent": Trial("coordinate descent", PLAIN_WEIGHTS, rounded_by(coordinate_descent)),
    "trained-codes": Trial("codes trained", PLAIN_WEIGHTS, trained(0.0005, "weights")),
    "trained-codes-fast": Trial("codes trained four times as fast", PLAIN_WEIGHTS, trained(0.002, "weights")),
    "trained-scales-and-norms": Trial(
        "scales and norms trained", PLAIN_WEIGHTS, trained(0.002, "scales", "norms")
    ),
}
