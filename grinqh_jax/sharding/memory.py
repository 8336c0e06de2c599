"""The memory that a model needs on each device of a mesh, from its configuration alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import abstract_tree, linear_shapes
from grinqh_jax.model.fixed_states import fixed_bytes, whole_layers
from grinqh_jax.model.parameters import EMBEDDING, axis_sizes, projections, routers, stored_dtypes, vectors
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding.cutting import cut_leaves
from grinqh_jax.sharding.rules import partition
from pallas_kernels.experts.batches import batch_rows

TARGETS = 29
"""Number of rows of the threshold tables that the converter writes."""

PREFILL_CHUNK = 512
"""Number of prompt tokens whose activations are in memory together."""


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device of a mesh. All devices have parts of the same size.

    Attributes:
      weights: Linear layers.
      other: Embedding, norms, routers and threshold tables, which are not cut.
      cache_token: Keys and values of one token, in the layers that keep the whole context.
      slot: States of a fixed size of one text.
      work: Temporary arrays, an estimate: of a prefill, or of one linear layer while the model is loaded.
    """

    weights: int
    other: int
    cache_token: int
    slot: int
    work: int

    def total(self, tokens: int, slots: int) -> int:
        """Returns the bytes with a cache of ``tokens`` tokens in all, in ``slots`` texts."""
        return self.weights + self.other + self.work + tokens * self.cache_token + slots * self.slot

    def tokens_that_fit(self, memory: int, slots: int, share: float) -> int:
        """Returns the number of tokens whose cache fits into a share of the memory that is left."""
        left = int(share * (memory - self.total(0, slots)))
        return max(left, 0) // max(self.cache_token, 1)


def device_memory(config: ModelConfig, devices: int, max_bits: int | None, context: int) -> DeviceMemory:
    """Returns the memory of a model on each of some devices, with bfloat16 keys, values and activations.

    Args:
      config: Configuration of the model.
      devices: Number of devices.
      max_bits: Bits of the stored codes; None for an unquantized model in bfloat16.
      context: Largest number of tokens of a text.

    Raises:
      UsageError: The model cannot be cut among so many devices.
    """
    leaves = _graded_leaves(config, max_bits) if max_bits is not None else _dense_leaves(config)
    local, whole = config, leaves
    if devices > 1:
        # The type is said because jax 0.12 makes axes explicit by default.
        automatic = (jax.sharding.AxisType.Auto,)
        cut = partition(config, jax.sharding.AbstractMesh((devices,), (AXIS,), automatic))
        local, leaves = cut.local, cut_leaves(config, dict(leaves), cut)
    sizes = {name: _part_bytes(leaf) for name, leaf in leaves.items()}
    linear = {name for name in sizes if name.rpartition(".")[2] in ("planes", "scales", "kernel")}
    linear -= {f"{name}.kernel" for name in routers(config)}
    token = 2 * whole_layers(config, context) * local.num_kv_heads * config.head_dim * _BF16
    return DeviceMemory(
        weights=sum(sizes[name] for name in linear),
        other=sum(size for name, size in sizes.items() if name not in linear),
        cache_token=token,
        slot=fixed_bytes(local, jnp.bfloat16, context),
        work=max(
            _prefill_bytes(config, local, devices, context), _cutting_bytes(whole) if devices > 1 else 0
        ),
    )


_BF16 = 2


def _graded_leaves(config: ModelConfig, max_bits: int) -> dict[str, Any]:
    return traverse_util.flatten_dict(abstract_tree(config, max_bits, TARGETS), sep=".")


def _dense_leaves(config: ModelConfig) -> dict[str, Any]:
    """Returns the abstract leaves of an unquantized model in bfloat16."""
    shapes = linear_shapes(config)
    experts = {name for name, projection in projections(config).items() if projection.of_experts}
    kernels = {
        f"{name}.kernel": (*((config.num_experts,) if name in experts else ()), *shapes[name])
        for name in projections(config)
    }
    kernels |= {f"{name}.kernel": (config.hidden_size, config.num_experts) for name in routers(config)}
    kernels |= {EMBEDDING: (config.vocab_size, config.hidden_size)}
    kernels |= {"lm_head.kernel": (config.hidden_size, config.vocab_size)}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in kernels.items()}
    dtypes = stored_dtypes(config)
    for name, shape in vectors(config).items():
        leaves[name] = jax.ShapeDtypeStruct(shape, dtypes[name])
    return leaves


def _part_bytes(leaf: Any) -> int:
    """Returns the bytes of an abstract leaf on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _prefill_bytes(config: ModelConfig, local: ModelConfig, devices: int, context: int) -> int:
    """Returns the temporary memory of a prefill: the largest dequantized weight or scores, and all the rest.

    All experts of a projection are dequantized together, and multiplied with equally many rows of each. The
    launch of ``experts.grouped`` takes about as many rows.
    """
    sizes, largest = axis_sizes(local), 0
    for projection in projections(config).values():
        (k, n), weights, rows = projection.shape(sizes), 1, PREFILL_CHUNK
        if projection.of_experts and config.mixture is not None:
            weights = config.num_experts
            rows = weights * batch_rows(PREFILL_CHUNK * config.mixture.rows, weights)
        largest = max(largest, weights * k * n * _BF16 + rows * (k + n) * 4)
    largest = max(largest, _score_bytes(local, devices, context))
    return largest + PREFILL_CHUNK * 4 * config.hidden_size * 4 + 2 * config.vocab_size * 4


def _score_bytes(local: ModelConfig, devices: int, context: int) -> int:
    """Returns the bytes of the scores of a layer, where XLA attends, not cuDNN (``fused_attention``).

    A score is in memory in float32, and its weight in bfloat16. Heads that cuDNN does not support are not
    considered.
    """
    attention = [layer.attention for layer in local.layers if layer.attention is not None]
    by_xla = [each for each in attention if devices > 1 or each.score_soft_cap is not None]
    positions = [min(context, (each.window or context) + PREFILL_CHUNK) for each in by_xla]
    return PREFILL_CHUNK * max(positions, default=0) * local.num_heads * (4 + _BF16)


def _cutting_bytes(leaves: dict[str, Any]) -> int:
    """Returns the temporary memory of cutting the largest leaf: all of it, and the digits of one plane."""
    largest = max(leaves.values(), key=lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize)
    whole = math.prod(largest.shape) * largest.dtype.itemsize
    digits = 16 * math.prod(largest.shape[-2:]) if largest.dtype == jnp.uint32 else 0
    return whole + digits
