"""Models of a given shape with random weights, made on the device: what benchmarks run on.

Codes are uniform and scales equal but for a random factor, so that outputs keep the size of the inputs;
activations are then those of a real forward pass, and the thresholds are calibrated on them, layer by
layer, so that decoding really reads the mean bits asked for.
"""

import functools
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import read_object
from grinqh_jax.model import decoder
from grinqh_jax.model.apply import HEAD, Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.layer_spec import axis_sizes, layer_spec
from grinqh_jax.model.linear import Linear
from pallas_kernels import Activations

TARGETS = tuple(1 + i / 4 for i in range(29))
"""Mean bits of the rows of every threshold table: 1 to 8."""

MAX_BITS = 8
CALIBRATION_TOKENS = 64
SAMPLES = 1 << 15
"""Activations of each layer that its thresholds are fitted to, at most."""


def hf_configs() -> dict[str, dict[str, Any]]:
    """Hugging Face's ``config.json`` of published models that can be benchmarked without weights, by name."""
    return json.loads((importlib.resources.files(__package__) / "shapes.json").read_text())


def shapes() -> dict[str, ModelConfig]:
    """The configurations of those models."""
    return {name: ModelConfig.from_hf(fields) for name, fields in hf_configs().items()}


def shape(name: str) -> ModelConfig:
    """The configuration of a published model, by its name, or of any model, by its directory.

    Raises:
      UsageError: there is none; names the published ones.
      CheckpointError: the directory's ``config.json`` cannot be read.
      UnsupportedModelError: it asks for what the decoder does not have.
    """
    known = shapes()
    if name in known:
        return known[name]
    file = pathlib.Path(name) / "config.json"
    if not file.is_file():
        raise UsageError(
            f"no shape is called {name!r}: choose from {', '.join(known)}, or name the directory of a model"
        )
    return ModelConfig.from_hf(read_object(file))


def label(name: str) -> str:
    """What results call the model that ``shape`` is asked for: a published one's name, or the directory's."""
    return pathlib.Path(name).resolve().name


def graded(config: ModelConfig, seed: int = 0, compute_dtype=jnp.bfloat16) -> Decoder:
    """A graded model with 8-bit random codes and thresholds for every target in ``TARGETS``."""
    tree = decoder.abstract_tree(config, MAX_BITS, len(TARGETS))
    model = Decoder.from_tree(config, _filled(tree, seed), compute_dtype)
    _calibrate(model, jax.random.key(seed))
    return model


def dense(config: ModelConfig, seed: int = 0, compute_dtype=jnp.bfloat16) -> Decoder:
    """An unquantized model with Gaussian weights."""
    tree = decoder.abstract_tree(config, MAX_BITS, len(TARGETS))
    sizes, projections = axis_sizes(config), layer_spec(config).projections

    def kernel(k: int, n: int):
        return {"kernel": jax.ShapeDtypeStruct((k, n), compute_dtype)}

    for layer in tree["layers"].values():
        layer |= {projection.name: kernel(*projection.shape(sizes)) for projection in projections}
    tree[HEAD] = kernel(config.hidden_size, config.vocab_size)
    return Decoder.from_tree(config, _filled(tree, seed), compute_dtype)


def _filled(tree, seed: int):
    """The abstract tree with arrays for leaves. Equal shapes share one compilation."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [
        _leaf(key, path[-1].key, leaf.shape, leaf.dtype.name)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, filled)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(key: jax.Array, name: str, size: tuple[int, ...], dtype: str) -> jax.Array:
    if name == "planes":
        return jax.random.bits(key, size, dtype)
    if name == "scales":  # uniform codes on (-2, 2) have the variance 4 / 3
        deviation = (size[0] * 128 * 4 / 3) ** -0.5
        return (deviation * jax.random.uniform(key, size, minval=0.5, maxval=1.5)).astype(dtype)
    if name == "kernel":
        return jax.random.normal(key, size, dtype) * jnp.asarray(size[0] ** -0.5, dtype)
    if name == "embedding":
        return jax.random.normal(key, size, dtype)
    if name == "columns":
        return jax.random.permutation(key, size[0]).astype(dtype)
    if name in ("scale", "gains"):  # "scale" is a norm's
        return jnp.ones(size, dtype)
    return jnp.zeros(size, dtype)  # thresholds and largest activations, until calibrated


def fitted_thresholds(sample: Float[Array, "m"]) -> Float[Array, "t 4"]:
    """Thresholds that give each mean of ``TARGETS`` on a sample of activations over their mean magnitude.

    Each level of a uniform quantizer has a sixteenth of the squared error of the one below, so the
    allocation of least error has thresholds a factor of 4 apart (``x**2 e(l) + lambda 2 l`` least);
    the first one is found by bisection on the share of the sample that reaches each level.
    """
    ordered = jnp.sort(jnp.abs(sample.astype(jnp.float32)))
    apart = 4.0 ** jnp.arange(4)

    def mean_bits(first):
        below = jnp.searchsorted(ordered, first[:, None] * apart, side="left")
        return 2 * jnp.sum(1 - below / len(ordered), axis=-1)

    targets = jnp.asarray(TARGETS, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = mean_bits(middle) >= targets
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = jnp.full(len(TARGETS), 2 * ordered[-1])
    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), top))
    return jnp.where(targets[:, None] >= MAX_BITS, 0.0, low[:, None] * apart)


class _Fitting(Dense):
    """An apply strategy: computes densely and keeps what calibration needs, by part of the layer."""

    def __init__(self):
        self.tables: dict[str, tuple[jax.Array, jax.Array]] = {}

    def product(self, name: str, linear: Linear, x: jax.Array) -> jax.Array:
        sample = x.reshape(-1)[:: -(-x.size // SAMPLES)]
        peak = jnp.max(jnp.abs(x)).astype(jnp.float32)
        self.tables[name.rsplit(".", 1)[-1]] = fitted_thresholds(sample), peak
        return super().product(name, linear, x)


def _calibrate(model: Decoder, key: jax.Array) -> None:
    """Sets the thresholds of every layer from a forward pass over random tokens."""
    tokens = jax.random.randint(key, (1, CALIBRATION_TOKENS), 0, model.config.vocab_size)
    positions = jnp.arange(CALIBRATION_TOKENS)[None]

    @jax.jit
    def layer_step(layer, x):
        fitting = _Fitting()
        x, _ = layer("layer", x, positions, fitting)
        return x, fitting.tables

    @jax.jit
    def head_step(norm, head, x):
        fitting = _Fitting()
        head(Activations.of(norm(x)), fitting)
        return fitting.tables

    x = model.embed(tokens, model.compute_dtype)
    for layer in model.layers:
        x, tables = layer_step(layer, x)
        for part, (thresholds, peak) in tables.items():
            _set(getattr(layer, part), thresholds, peak)
    for part, (thresholds, peak) in head_step(model.norm, model.lm_head, x).items():
        _set(model.lm_head.block(part), thresholds, peak)


def _set(linear: Linear, thresholds: jax.Array, peak: jax.Array) -> None:
    linear.thresholds[...] = thresholds
    linear.max_activation[...] = peak
