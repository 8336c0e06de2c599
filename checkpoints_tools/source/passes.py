"""Passes of windows of text through a dense layer, whose experts may be in memory in groups.

A layer of gpt-oss-120b has 6.4 GB of experts. Windows first move past everything before the mixture. Then the
experts are read in groups, and every window adds up the results of each group.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.source.array_cache import free_bytes
from checkpoints_tools.source.layer import stacked_experts
from grinqh_jax.model.apply import Apply, Dense
from grinqh_jax.model.decoder_layer import DecoderLayer
from grinqh_jax.model.experts import DenseExperts
from grinqh_jax.model.layer_spec import GatedExperts, ResidualBlock

ALL_HELD = (None,)
"""The groups of a layer that holds all of its experts."""

BYTES_OF_A_WEIGHT = 2
"""Bytes of a weight in memory: experts are stored in bfloat16 or less."""


class Observing(Dense):
    """An apply strategy that collects values.

    Attributes:
      seen: Arrays by name of the projection; here none.
    """

    def __init__(self, layer: DecoderLayer):
        self.seen: dict[str, Any] = {}


def mixture_of(layer: DecoderLayer) -> tuple[ResidualBlock, GatedExperts] | None:
    """Returns the block of a layer's mixture of experts, its last one, and the mixture; None without one."""
    block = layer.spec.blocks[-1]
    return (block, block.mixer) if isinstance(block.mixer, GatedExperts) else None


def before_mixture(layer: DecoderLayer, x: Float[Array, "t d"], apply: Apply) -> Float[Array, "t d"]:
    """Returns the residual stream of a window before the layer's mixture, or behind a layer without one."""
    stream, update, positions = x[None], None, jnp.arange(len(x))[None]
    for block in layer.spec.blocks if mixture_of(layer) is None else layer.spec.blocks[:-1]:
        stream, update, _ = layer.run_block("layer", block, stream, update, positions, apply)
    assert update is not None, "a block comes before a mixture"
    return (stream + update.array)[0]


def of_mixture(layer: DecoderLayer, x: Float[Array, "t d"], apply: Apply) -> Float[Array, "t d"]:
    """Returns what the experts that a layer holds add to the residual stream of a window before them."""
    mixture = mixture_of(layer)
    assert mixture is not None, "the layer has a mixture of experts"
    _, inputs = layer.inputs(mixture[0], x[None], None)
    written = layer.mixture("layer", *mixture, inputs, apply)
    return layer.update(mixture[0], written).array[0]


def each_group(source, i: int, layer: DecoderLayer) -> Iterator[dict[str, Array]]:
    """Puts the experts of layer ``i`` into ``layer``, group by group, and yields their kernels by projection.

    The groups are equally large, and as few as fit into twice ``free_bytes``: 2 GiB on a CPU. The last one
    may end with zeros. The kernels of a group are freed before the next one is read, unless the caller has
    copied the dict. Yields nothing for a layer without a mixture.

    Args:
      source: See ``layer.read_layer``.
      i: Index of the layer.
      layer: The layer, read without experts.
    """
    if mixture_of(layer) is None:
        return
    names = [projection.name for projection in layer.spec.projections if projection.of_experts]
    shapes = [source.parameters[f"layers.{i}.{name}.kernel"] for name in names]
    count = source.config.num_experts
    size = groups_of(count, BYTES_OF_A_WEIGHT * sum(map(math.prod, shapes)))
    for first in range(0, count, size):
        kernels = {n: stacked_experts(source, f"layers.{i}.{n}.kernel", first, size) for n in names}
        for name, kernel in kernels.items():
            _hold(layer, name, kernel, first, count)
        del kernel
        yield kernels
        for name, shape in zip(names, shapes, strict=True):
            _hold(layer, name, np.zeros((0, *shape[1:]), np.uint16), first, count)
        kernels.clear()  # Here, because the caller's loop still has the dict.


def groups_of(count: int, size: int) -> int:
    """Returns the number of experts of a group, of ``count`` experts with ``size`` bytes."""
    groups = min(-(-size // (2 * free_bytes())), count)
    return -(-count // groups)


def _hold(layer: DecoderLayer, name: str, kernel: Array | np.ndarray, first: int, count: int) -> None:
    """Replaces the experts that a projection holds."""
    bias = getattr(layer, name).bias
    whole = len(kernel) == count
    experts = DenseExperts(
        jnp.asarray(kernel),
        None if bias is None else bias[...],
        first=None if whole else first,
        num_experts=count,
    )
    setattr(layer, name, experts)


def pass_windows(
    layer: DecoderLayer,
    hidden: Float[np.ndarray, "s t d"],
    groups: Iterable[Any] = ALL_HELD,
    observer: Callable[[DecoderLayer], Observing] = Observing,
    add: Callable[[dict[str, Any]], None] = lambda seen: None,
) -> None:
    """Moves windows past a dense layer.

    Args:
      layer: Dense layer.
      hidden: Hidden states before the layer, in host memory; overwritten by the states after the layer.
      groups: ``each_group`` of the layer; by default it holds all experts.
      observer: Makes the apply strategy.
      add: Called with the values of ``Observing.seen`` for every window: once for the projections before the
        mixture and for the first one of the mixture, and once for each group for the second one.
    """
    for window in hidden:
        window[...], seen = _before(layer, window, observer)
        add(seen)
    if mixture_of(layer) is None:
        return
    totals = np.zeros(hidden.shape, np.float32)
    for number, _ in enumerate(groups):
        for window, total in zip(hidden, totals, strict=True):
            update, seen = _mixture(layer, window, observer, is_first=number == 0)
            total += np.asarray(update, np.float32)
            add(seen)
    for window, total in zip(hidden, totals, strict=True):
        window[...] = window + total.astype(window.dtype)


@partial(jax.jit, static_argnames="observer")
def _before(layer: DecoderLayer, x: Float[Array, "t d"], observer):
    apply = observer(layer)
    return before_mixture(layer, x, apply), apply.seen


@partial(jax.jit, static_argnames=("observer", "is_first"))
def _mixture(layer: DecoderLayer, x: Float[Array, "t d"], observer, is_first: bool):
    apply = observer(layer)
    update = of_mixture(layer, x, apply)
    # All groups have the inputs of the first projection.
    reads = layer.spec.blocks[-1].reads.name
    return update, {name: seen for name, seen in apply.seen.items() if is_first or name != reads}
