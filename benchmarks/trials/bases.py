"""Trials of other bases of the residual stream and of activations inside the layers.

Level gains are fitted, not trained. Weights are refitted as in the product.

* ``basis``: the product with these flags.
* ``original-basis``: the basis that the model was trained in.
* ``hadamard-64``, ``hadamard-8``: the first 64 or 8 principal axes mixed by a Hadamard matrix.
* ``random-rotation``: a random orthogonal matrix instead of the principal axes.
* ``centred-head``: the output projection without its mean over the vocabulary, which shifts all logits
  equally.
* ``equal-rows-of-down``: hidden channels of the MLP scaled so that all rows of ``down`` have the same norm.
  The ``up`` half of ``gate_up`` absorbs the inverse scales.
* ``value-axes``: the values of each head rotated onto the principal axes of the inputs of ``o``, in the
  outputs of ``qkv`` and the rows of ``o``.
* ``learned-rotation``: gradient descent from the principal axes to the least cost, errors and bits, of
  reading channels with normal activations. The principal axes depend only on the sum over the layers that
  read the residual stream; this trial gives each of them its moments, its rows and its price of a bit.

All of these models compute the same function as the original.
"""

from collections.abc import Callable, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.special
from trial import NOT_TRAINED, Trial, patched

from checkpoints_tools.baselines.model import mean_moments
from checkpoints_tools.calibration.text import split_windows
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert import principal_basis, survey
from checkpoints_tools.convert.plan import make_plan
from checkpoints_tools.convert.principal_basis import principal_axes, second_moments
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from checkpoints_tools.source.passes import pass_windows
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import stream_readers
from pallas_kernels import codes

BITS, POINTS, STEPS, RATE = 3.0, 64, 300, 0.0003
"""Settings of ``learned-rotation``: mean bits of the prices, quantiles of the normal distribution, steps and
learning rate of Adam."""

Changed = Callable[[HFCheckpoint, np.ndarray], Mapping[str, np.ndarray]]
"""Maps a checkpoint and calibration windows to the kernels, by key, that replace those of the checkpoint."""


def mixed_axes(leading: int):
    """Returns ``principal_axes`` with the first ``leading`` axes mixed by a Hadamard matrix."""

    def axes(moments: np.ndarray) -> np.ndarray:
        mixed = principal_axes(moments)
        mixed[:, :leading] = mixed[:, :leading] @ scipy.linalg.hadamard(leading) / np.sqrt(leading)
        return mixed

    return axes


def random_axes(moments: np.ndarray) -> np.ndarray:
    """Returns a random orthogonal matrix of the size of ``moments``."""
    gaussian = np.random.default_rng(0).standard_normal(moments.shape)
    return np.ascontiguousarray(np.linalg.qr(gaussian)[0], np.float32)


def readers_of(source: HFCheckpoint, *arguments) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Returns ``(second moments, inner products of its rows, outputs)`` of each layer that reads the stream.

    It replaces ``second_moments``.
    """
    by_name, add = {}, principal_basis._with_moments

    def record(total, moments, name):
        by_name[name] = by_name.get(name, 0) + np.asarray(moments, np.float64)
        return add(total, moments, name)

    with mock.patch.object(principal_basis, "_with_moments", record):
        second_moments(source, *arguments)
    readers = []
    for name, moments in by_name.items():
        gains = source.read(f"{stream_readers(source.config)[name]}.scale")
        kernel = source.read(f"{name}.kernel").astype(np.float32) * gains[:, None].astype(np.float32)
        readers.append((moments, kernel @ kernel.T, kernel.shape[1]))
    return readers


def learned_axes(readers: list[tuple[np.ndarray, np.ndarray, int]]) -> np.ndarray:
    """Returns the axes of ``learned-rotation``."""
    start = principal_axes(sum(moments for moments, _, _ in readers))
    moments, rows, outputs = (
        jnp.asarray(np.stack(arrays), jnp.float32) for arrays in zip(*readers, strict=True)
    )
    w = jax.random.normal(jax.random.key(0), (128, 4096))
    errors = codes.level_errors(w, codes.quantize(w))
    squares = jnp.square(scipy.special.ndtri((np.arange(POINTS) + 0.5) / POINTS))
    bits = 2.0 * jnp.arange(len(errors))

    def costs(axes, price):
        """Returns costs ``[readers, channels, points, levels]`` in bits."""
        energies = jnp.sum((moments @ axes) * axes, axis=1) * jnp.sum((rows @ axes) * axes, axis=1)
        return energies[..., None, None] * squares[:, None] * errors / price[:, None, None, None] + bits

    @jax.jit
    def mean_bits(price):
        return bits[jnp.argmin(costs(start, price), axis=-1)].mean(axis=(1, 2))

    @jax.value_and_grad
    def cost(turn):
        skew, one = turn - turn.T, jnp.eye(len(turn))
        axes = start @ jnp.linalg.solve(one - skew, one + skew)
        return jnp.sum(outputs * costs(axes, price).min(axis=-1).mean(axis=(1, 2))) / jnp.sum(outputs)

    low, high = jnp.full(len(readers), -40.0), jnp.full(len(readers), 40.0)  # logarithms of prices
    for _ in range(40):
        middle = (low + high) / 2
        more = mean_bits(jnp.exp(middle)) > BITS
        low, high = jnp.where(more, middle, low), jnp.where(more, high, middle)
    price, adam, turn, compiled = jnp.exp(high), optax.adam(RATE), jnp.zeros(start.shape), jax.jit(cost)
    state = adam.init(turn)
    for step in range(STEPS):
        value, gradient = compiled(turn)
        if step in (0, STEPS - 1):
            print(f"learned rotation, step {step}: {value:.4f} bits and bits' worth of errors", flush=True)
        updates, state = adam.update(gradient, state)
        turn = optax.apply_updates(turn, updates)
    turn = np.asarray(turn - turn.T, np.float64)
    one = np.eye(len(turn))
    return np.ascontiguousarray(start @ np.linalg.solve(one - turn, one + turn), np.float32)


def with_axes(axes):
    """Returns a ``change`` that replaces ``principal_axes`` with ``axes``."""
    return patched((survey, "principal_axes", axes))


class ChangedCheckpoint:
    """A checkpoint like ``source`` with some kernels replaced by arrays in memory."""

    def __init__(self, source: HFCheckpoint, kernels: Mapping[str, np.ndarray]):
        self.source, self.kernels = source, kernels

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def read(self, key: str, rows=slice(None)) -> np.ndarray:
        """Reads like ``HFCheckpoint.read``; replaced kernels are float32."""
        return self.kernels[key][:, rows] if key in self.kernels else self.source.read(key, rows)


def of_source(changed: Changed):
    """Returns a ``change`` that gives the converter other kernels. The reference of the measurement stays."""

    def plan_of(source, calibration, options):
        kernels = changed(source, calibration.windows)
        return make_plan(ChangedCheckpoint(source, kernels), calibration, options)

    # Rotated kernels are rounded to the dtype of the source. Replaced kernels are float32 and would otherwise
    # be more precise than those of the other trials.
    dtype = np.dtype(jnp.bfloat16)
    return patched(
        (convert, "make_plan", plan_of),
        (principal_basis, "_device_dtype", lambda of_source: dtype),
    )


def centred_head(source: HFCheckpoint, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the kernel of ``centred-head``. A tied embedding keeps its values."""
    kernel = source.read(f"{HEAD}.kernel").astype(np.float32)
    return {f"{HEAD}.kernel": kernel - kernel.mean(axis=1, keepdims=True)}


def equal_rows_of_down(source: HFCheckpoint, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the kernels of ``equal-rows-of-down``."""
    kernels = {}
    for i in range(source.config.num_layers):
        gate_up = source.read(f"layers.{i}.gate_up.kernel").astype(np.float32)
        down = source.read(f"layers.{i}.down.kernel").astype(np.float32)
        sizes = np.linalg.norm(down, axis=1)
        sizes /= np.exp(np.log(sizes).mean())
        gate, up = np.split(gate_up, 2, axis=1)
        kernels[f"layers.{i}.gate_up.kernel"] = np.concatenate([gate, up * sizes], axis=1)
        kernels[f"layers.{i}.down.kernel"] = down / sizes[:, None]
    return kernels


def value_axes(source: HFCheckpoint, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the kernels of ``value-axes``."""
    config = source.config
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    hidden = embed(source, split_windows(windows)[0], jnp.float32)
    kernels = {}
    for i in range(config.num_layers):
        own, vectors = read_layer(source, i)
        layer = dense_layer(source, i, own, vectors, jnp.float32)
        moments = np.asarray(mean_moments(layer, hidden)["o"][0], np.float64)
        pass_windows(layer, hidden)
        qkv, o = own["qkv"].astype(np.float32), own["o"].astype(np.float32)
        first = qkv.shape[1] - config.num_kv_heads * size
        for kv in range(config.num_kv_heads):
            heads = [slice(h * size, (h + 1) * size) for h in range(kv * group, (kv + 1) * group)]
            axes = principal_axes(sum(moments[head, head] for head in heads))
            values = slice(first + kv * size, first + (kv + 1) * size)
            qkv[:, values] = qkv[:, values] @ axes
            for head in heads:
                o[head] = axes.T @ o[head]
        kernels |= {f"layers.{i}.qkv.kernel": qkv, f"layers.{i}.o.kernel": o}
    return kernels


BASES = {
    "basis": Trial("the product, gains fitted", NOT_TRAINED),
    "original-basis": Trial("the model's own basis", ("--basis", "original", *NOT_TRAINED)),
    "hadamard-64": Trial("64 leading axes mixed", NOT_TRAINED, with_axes(mixed_axes(64))),
    "hadamard-8": Trial("8 leading axes mixed", NOT_TRAINED, with_axes(mixed_axes(8))),
    "random-rotation": Trial("random axes", NOT_TRAINED, with_axes(random_axes)),
    "centred-head": Trial("centred output projection", NOT_TRAINED, of_source(centred_head)),
    "equal-rows-of-down": Trial("equal rows of `down`", NOT_TRAINED, of_source(equal_rows_of_down)),
    "value-axes": Trial("principal axes of the values", NOT_TRAINED, of_source(value_axes)),
    "learned-rotation": Trial(
        "axes learned from the principal ones",
        NOT_TRAINED,
        patched((survey, "second_moments", readers_of), (survey, "principal_axes", learned_axes)),
    ),
}
