"""Numbers of weights of the linear layers: of all that are stored, and of those that a token reads."""

import math

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_shapes
from grinqh_jax.model.parameters import stored_dtypes, vectors


def weights_stored(config: ModelConfig) -> dict[str, int]:
    """Returns the number of weights of all linear layers by name, those of all experts."""
    counts = _expert_counts(config)
    return {name: k * n * counts.get(name, (1, 1))[0] for name, (k, n) in linear_shapes(config).items()}


def weights_read(config: ModelConfig) -> dict[str, int]:
    """Returns the number of weights that all linear layers apply to a token, by name: of chosen experts."""
    counts = _expert_counts(config)
    return {name: k * n * counts.get(name, (1, 1))[1] for name, (k, n) in linear_shapes(config).items()}


def vector_bytes_read(config: ModelConfig) -> int:
    """Returns the bytes of norm scales, biases and other ``vectors`` that a token reads."""
    counts, dtypes, total = _expert_counts(config), stored_dtypes(config), 0
    for name, shape in vectors(config).items():
        stored, read = counts.get(name.removesuffix(".bias"), (1, 1))
        total += math.prod(shape) // stored * read * dtypes[name].itemsize
    return total


def _expert_counts(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns, for each linear layer of experts, the number of experts and that of the chosen ones."""
    return {
        f"layers.{i}.{projection.name}": (config.num_experts, spec.experts.rows)
        for i, spec in enumerate(config.layers)
        for projection in spec.projections
        if projection.of_experts and spec.experts is not None
    }
