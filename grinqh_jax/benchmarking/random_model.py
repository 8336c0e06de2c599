"""Models of a given shape with random weights, made on the device, for benchmarks.

Codes are uniform, and scales are equal up to a random factor, so outputs keep the size of the inputs.
Thresholds are calibrated layer by layer on the activations of a forward pass, so decoding reads the requested
mean bits.
"""

import functools
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import read_object
from grinqh_jax.model import decoder
from grinqh_jax.model.apply import HEAD, AnyLinear, Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.experts import DenseExperts, GradedExperts
from grinqh_jax.model.linear import GradedLinear, Linear
from grinqh_jax.model.parameters import axis_sizes
from grinqh_jax.model.partition import AXIS, ExchangeSetting
from grinqh_jax.sharding.cutting import cut_leaves
from grinqh_jax.sharding.program import jit_of_parts
from grinqh_jax.sharding.rules import partition
from pallas_kernels import Activations
from pallas_kernels.layout import GROUP

TARGETS = tuple(1 + i / 4 for i in range(29))
"""Mean bits of the rows of every threshold table."""

MAX_BITS = 8
CALIBRATION_TOKENS = 64
SAMPLES = 1 << 15
"""Largest number of activations that the thresholds of a layer are fitted to."""


def hf_configs() -> dict[str, dict[str, Any]]:
    """Returns name -> Hugging Face ``config.json`` of the published models with known shapes."""
    return json.loads((importlib.resources.files(__package__) / "shapes.json").read_text())


def shapes() -> dict[str, ModelConfig]:
    """Returns name -> configuration of the published models with known shapes."""
    return {name: ModelConfig.from_hf(fields) for name, fields in hf_configs().items()}


def shape(name: str) -> ModelConfig:
    """Returns the configuration of a published model by name, or of any model by directory.

    Raises:
      UsageError: the name is unknown and no such directory has a ``config.json``; names the published models.
      CheckpointError: the directory's ``config.json`` cannot be read.
      UnsupportedModelError: the decoder does not implement the model's architecture or options.
    """
    known = shapes()
    if name in known:
        return known[name]
    file = pathlib.Path(name) / "config.json"
    if not file.is_file():
        raise UsageError(
            f"no shape is called {name!r}: choose from {', '.join(known)}, or give the directory of a model"
        )
    return ModelConfig.from_hf(read_object(file))


def label(name: str) -> str:
    """Returns the name of a shape in results: that of the published model, or of the directory."""
    return pathlib.Path(name).resolve().name


def graded(
    config: ModelConfig,
    seed: int = 0,
    compute_dtype=jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
    exchange: ExchangeSetting = "auto",
) -> Decoder:
    """Returns a graded model with random 8-bit codes and thresholds for every target in ``TARGETS``.

    On a mesh each device makes its part of the weights, with other values than a single device.
    """
    tree = decoder.abstract_tree(config, MAX_BITS, len(TARGETS))
    model = _model(config, tree, seed, compute_dtype, mesh, exchange)
    _calibrate(model, jax.random.key(seed))
    return model


def dense(
    config: ModelConfig,
    seed: int = 0,
    compute_dtype=jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
    exchange: ExchangeSetting = "auto",
) -> Decoder:
    """Returns an unquantized model with Gaussian weights, on a mesh as ``graded``."""
    return _model(config, dense_tree(config, compute_dtype), seed, compute_dtype, mesh, exchange)


def dense_tree(config: ModelConfig, compute_dtype=jnp.bfloat16) -> dict[str, Any]:
    """Returns the abstract arrays of an unquantized model by name in the state tree."""
    tree = decoder.abstract_tree(config, MAX_BITS, len(TARGETS))
    sizes = axis_sizes(config)

    def kernel(*size: int):
        return {"kernel": jax.ShapeDtypeStruct(size, compute_dtype)}

    for i, spec in enumerate(config.layers):
        layer = tree["layers"][str(i)]
        for projection in spec.projections:
            bias = {"bias": layer[projection.name]["bias"]} if projection.bias else {}
            experts = (config.num_experts,) if projection.of_experts else ()
            layer[projection.name] = kernel(*experts, *projection.shape(sizes)) | bias
    tree[HEAD] = kernel(config.hidden_size, config.vocab_size)
    return tree


def _model(
    config: ModelConfig,
    tree: dict[str, Any],
    seed: int,
    compute_dtype,
    mesh: jax.sharding.Mesh | None,
    exchange: ExchangeSetting,
) -> Decoder:
    """Returns a model with random arrays of the shapes in ``tree``."""
    cut = None
    if mesh is not None:
        cut = partition(config, mesh, exchange)
        leaves = traverse_util.flatten_dict(tree, sep=".")
        tree = traverse_util.unflatten_dict(cut_leaves(config, leaves, cut), sep=".")
    return Decoder.from_tree(config, _filled(tree, seed), compute_dtype, cut)


def _filled(tree, seed: int):
    """Returns the abstract tree with random arrays as leaves. Leaves of equal shape share one compilation."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [
        _filler(leaf.sharding)(key, path[-1].key, leaf.shape, leaf.dtype.name)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, filled)


@functools.cache
def _filler(sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(_leaf, static_argnums=(1, 2, 3), out_shardings=sharding)


def _leaf(key: jax.Array, name: str, size: tuple[int, ...], dtype: str) -> jax.Array:
    if name == "planes":
        return jax.random.bits(key, size, dtype)
    if name == "scales":  # uniform codes on (-2, 2) have a variance of 4 / 3
        deviation = (size[-2] * GROUP * 4 / 3) ** -0.5
        return (deviation * jax.random.uniform(key, size, minval=0.5, maxval=1.5)).astype(dtype)
    if name == "kernel":
        return jax.random.normal(key, size, dtype) * jnp.asarray(size[-2] ** -0.5, dtype)
    if name in ("embedding", "convolution"):
        return jax.random.normal(key, size, dtype)
    if name == "columns":
        return jax.random.permutation(key, size[0]).astype(dtype)
    if name in ("scale", "gains"):  # "scale" belongs to a norm
        return jnp.ones(size, dtype)
    return jnp.zeros(size, dtype)  # thresholds and largest activations, set by _calibrate


def fitted_thresholds(sample: Float[Array, "m"]) -> Float[Array, "t 4"]:
    """Returns thresholds that give each mean of ``TARGETS`` on a sample of activations.

    Each level of a uniform quantizer has a sixteenth of the squared error of the level below. The allocation
    that minimizes ``x**2 e(l) + lambda 2 l`` then has thresholds a factor of 4 apart. Bisection on the share
    of the sample that reaches each level finds the first threshold.
    """
    ordered = jnp.sort(jnp.abs(sample.astype(jnp.float32)))
    factors = 4.0 ** jnp.arange(4)

    def mean_bits(first):
        below = jnp.searchsorted(ordered, first[:, None] * factors, side="left")
        return 2 * jnp.sum(1 - below / len(ordered), axis=-1)

    targets = jnp.asarray(TARGETS, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = mean_bits(middle) >= targets
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = jnp.full(len(TARGETS), 2 * ordered[-1])
    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), top))
    return jnp.where(targets[:, None] >= MAX_BITS, 0.0, low[:, None] * factors)


class _Fitting(Dense):
    """An apply strategy that computes densely and fits thresholds, by projection or vocabulary block."""

    def __init__(self):
        self.tables: dict[str, tuple[jax.Array, jax.Array]] = {}

    def product(self, name: str, linear: AnyLinear, x: jax.Array) -> jax.Array:
        sample = x.reshape(-1)[:: -(-x.size // SAMPLES)]
        peak = jnp.max(jnp.abs(x)).astype(jnp.float32)
        if linear.input_cut is not None:  # All devices fit the same thresholds to the inputs of all.
            sample = jax.lax.all_gather(sample, AXIS).reshape(-1)
            peak = jax.lax.pmax(peak, AXIS)
        self.tables[name.rsplit(".", 1)[-1]] = fitted_thresholds(sample), peak
        return super().product(name, linear, x)


def _calibrate(model: Decoder, key: jax.Array) -> None:
    """Sets the thresholds of every linear layer from a forward pass over random tokens."""
    tokens = jax.random.randint(key, (1, CALIBRATION_TOKENS), 0, model.config.vocab_size)
    positions = jnp.arange(CALIBRATION_TOKENS)[None]

    def layer_step(layer, x):
        fitting = _Fitting()
        x, _ = layer("layer", x, positions, fitting)
        return x, fitting.tables

    def head_step(norm, head, x):
        fitting = _Fitting()
        head(Activations.of(norm(x)), fitting)
        return fitting.tables

    run_layer = jit_of_parts(layer_step, model.partition)
    run_head = jit_of_parts(head_step, model.partition)
    x = model.embed(tokens, model.compute_dtype)
    for layer in model.layers:
        x, tables = run_layer(layer, x)
        for projection, (thresholds, peak) in tables.items():
            _set(getattr(layer, projection), thresholds, peak)
    for block, (thresholds, peak) in run_head(model.norm, model.lm_head, x).items():
        _set(model.lm_head.block(block), thresholds, peak)


def _set(linear: Linear | DenseExperts | GradedExperts, thresholds: jax.Array, peak: jax.Array) -> None:
    assert isinstance(linear, GradedLinear | GradedExperts), "only graded layers are calibrated"
    linear.thresholds[...] = thresholds
    linear.max_activation[...] = peak
