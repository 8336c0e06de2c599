"""Tensors that a checkpoint stores together, and where each of them is.

Some checkpoints have one tensor for all experts of a layer. A shared expert of another width than the others
is one or several experts, whose tensors get names like ``shared_expert.down_proj.weight[0]``. Qwen3-Next
stores the projections of gated delta nets key head by key head.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from grinqh_jax.hf import mxfp4
from grinqh_jax.hf.params import (
    is_kernel,
    is_of_experts,
    shared_expert_is_cut,
    shared_experts,
    shared_names,
    shared_width,
    sources,
    stored_shared_names,
    tensor_names,
)
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families import FAMILIES
from grinqh_jax.model.families.family import ExpertLayout


@dataclasses.dataclass(frozen=True)
class Part:
    """The place of an expert's tensor in a stored one.

    Attributes:
      shape: Shape of the tensor.
      index: Range of each axis of the stored tensor.
      transposed: Whether the range is the transposed tensor.
      scales: Stored name of the scales, if the stored tensor has the blocks of ``mxfp4``; None otherwise.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    transposed: bool = False
    scales: str | None = None

    def take(self, stored: Any, scales: Any = None) -> np.ndarray:
        """Returns the tensor.

        Args:
          stored: The stored tensor: an array, or a slice of safetensors, which is read in whole ranges.
          scales: The same for the scales.
        """
        value = self._range(stored)
        if scales is not None:
            value = mxfp4.dequantize(value, self._range(scales))
        return value.reshape(self.shape[::-1]).T if self.transposed else value.reshape(self.shape)

    def _range(self, stored: Any) -> np.ndarray:
        whole = stored[tuple(slice(axis.start, axis.stop) for axis in self.index)]
        return whole[tuple(slice(None, None, axis.step) for axis in self.index)]

    def put(self, stored: np.ndarray, value: np.ndarray) -> None:
        """Writes the tensor into a stored one."""
        place = stored[self.index]
        place[...] = (value.T if self.transposed else value).reshape(place.shape)


@dataclasses.dataclass(frozen=True)
class RowsOfHeads:
    """The place of a tensor in a stored one whose rows are ordered by head.

    Attributes:
      shape: Shape of the tensor.
      heads: Number of heads.
      ranges: Ranges of the rows of each head. The tensor has the first range of all heads, then the next.
      scales: See ``Part``.
    """

    shape: tuple[int, ...]
    heads: int
    ranges: tuple[slice, ...]
    scales: None = None

    def take(self, stored: Any, scales: None = None) -> np.ndarray:
        """Returns the tensor. See ``Part.take``."""
        rows = self._by_head(stored[:])
        others = self.shape[1:]
        return np.concatenate([rows[:, which].reshape(-1, *others) for which in self.ranges])

    def put(self, stored: np.ndarray, value: np.ndarray) -> None:
        """Writes the tensor into a stored one."""
        ends = np.cumsum([self.heads * (which.stop - which.start) for which in self.ranges])
        for which, part in zip(self.ranges, np.split(value, ends[:-1]), strict=True):
            self._by_head(stored)[:, which] = self._by_head(part)

    def _by_head(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(self.heads, -1, *rows.shape[1:])


@dataclasses.dataclass(frozen=True)
class PaddedPart:
    """The place of a tensor whose first rows and columns are a range of a stored one, and the others zeros.

    Attributes:
      shape: Shape of the tensor.
      index: Range of each axis of the stored tensor.
      scales: See ``Part``.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    scales: None = None

    def take(self, stored: Any, scales: None = None) -> np.ndarray:
        """Returns the tensor. See ``Part.take``."""
        value = stored[self.index]
        return np.pad(value, [(0, whole - size) for whole, size in zip(self.shape, value.shape, strict=True)])

    def put(self, stored: np.ndarray, value: np.ndarray) -> None:
        """Writes the tensor into a stored one, without the zeros."""
        place = stored[self.index]
        place[...] = value[tuple(slice(0, size) for size in place.shape)]


Place = Part | RowsOfHeads | PaddedPart


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """A stored tensor that holds several tensors.

    Attributes:
      shape: Its shape.
      parts: Its tensors, by name.
      scales: Name of the tensor of scales, in which the last axis of ``shape`` is missing; None for none.
      usual: Whether the family's checkpoints have it, unless they are quantized.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Place]
    scales: str | None = None
    usual: bool = True


@functools.lru_cache(maxsize=8)
def stored_forms(config: ModelConfig) -> dict[str, StoredForm]:
    """Returns, by name, the tensors that a checkpoint may have in place of single ones."""
    forms: dict[str, StoredForm] = {}
    together = FAMILIES[config.family].delta_nets_by_head
    for key in sorted(sources(config)):
        if is_of_experts(config, key):
            forms |= _together(config, key) | _cut_shared_expert(config, key)
        elif together and key.endswith(".delta_in.kernel"):
            forms |= _delta_net_by_head(config, key, together)
    return forms


def as_stored(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors by the names of a checkpoint that is not quantized."""
    stored = dict(tensors)
    for name, form in stored_forms(config).items():
        if form.usual and form.parts.keys() <= stored.keys():
            whole = np.empty(form.shape, stored[next(iter(form.parts))].dtype)
            for tensor, part in form.parts.items():
                part.put(whole, stored.pop(tensor))
            stored[name] = whole
    return stored


def _together(config: ModelConfig, key: str) -> dict[str, StoredForm]:
    """Returns the stored tensors with a kernel or bias of all routed experts of a layer."""
    family, names, tensors = FAMILIES[config.family], tensor_names(config, key), sources(config)[key]
    layout = family.experts_together or ExpertLayout()
    tensors = tensors[: len(tensors) - len(shared_names(config, key))]
    # "experts.{e}.gate_proj.weight" and "experts.{e}.up_proj.weight" are "experts.gate_up_proj".
    prefix, *_ = names[0].split(".{e}.")
    projections = [name.rpartition(".")[0].rpartition(".")[2].removesuffix("_proj") for name in names]
    stored = f"{prefix}.{'_'.join(projections)}_proj" + ("" if is_kernel(key) else "_bias")
    experts, (width, *inputs) = len(tensors) // len(names), tensors[0].shape
    outputs = width * len(names)
    rows = [
        slice(j, outputs, len(names)) if layout.interleaved else slice(j * width, (j + 1) * width)
        for j in range(len(names))
    ]
    transposed = layout.transposed and is_kernel(key)
    others = [slice(0, size) for size in inputs]

    def parts(*more: slice, scales: str | None = None) -> dict[str, Part]:
        result = {}
        for index, tensor in enumerate(tensors):
            expert, j = divmod(index, len(names))
            axes = [rows[j], *more] if scales else [*others, rows[j]] if transposed else [rows[j], *others]
            place = slice(expert, expert + 1), *axes
            result[tensor.name] = Part(tensor.shape, place, transposed and not scales, scales)
        return result

    shape = (*inputs, outputs) if transposed else (outputs, *inputs)
    forms = {stored: StoredForm((experts, *shape), parts(), usual=family.experts_together is not None)}
    if family.quant_method == mxfp4.METHOD and is_kernel(key) and inputs[0] % mxfp4.BLOCK == 0:
        blocks, scales = f"{stored}_blocks", f"{stored}_scales"
        count = inputs[0] // mxfp4.BLOCK
        packed = parts(slice(0, count), scales=scales)
        shape = experts, outputs, count, mxfp4.BLOCK // 2
        forms[blocks] = StoredForm(shape, packed, scales, usual=False)
    return forms


def _cut_shared_expert(config: ModelConfig, key: str) -> dict[str, StoredForm]:
    """Returns the stored tensors of a shared expert that is cut; none if it is as wide as the others."""
    if not shared_expert_is_cut(config):
        return {}
    width, each = shared_width(config), config.expert_size
    names = stored_shared_names(config, key)
    shapes = {source.name: source.shape for source in sources(config)[key]}
    forms = {}
    for name in names:
        shape = shapes[f"{name}[0]"]
        # The channels inside the expert are outputs of the first projection, and inputs of the second.
        cut = 0 if len(names) > 1 else 1
        parts: dict[str, Place] = {}
        for j in range(shared_experts(config)):
            channels = slice(j * each, min((j + 1) * each, width))
            index = tuple(channels if axis == cut else slice(0, size) for axis, size in enumerate(shape))
            parts[f"{name}[{j}]"] = PaddedPart(shape, index)
        whole = tuple(width if axis == cut else size for axis, size in enumerate(shape))
        forms[name] = StoredForm(whole, parts)
    return forms


def _delta_net_by_head(config: ModelConfig, key: str, names: tuple[str, str]) -> dict[str, StoredForm]:
    """Returns the two stored tensors with the four projections that a gated delta net reads the stream with.

    For each key head the first has the rows of query, key, values and gates, the second those of shares and
    decays. Values, gates, shares and decays are those of the value heads that share the key head.
    """
    heads, tensors = config.delta_heads, sources(config)[key]
    assert heads is not None, "gated delta nets have heads"
    shared = heads.value_heads // heads.key_heads
    values, i = shared * heads.value_dim, key.split(".")[1]
    # The widths of each tensor's ranges in the rows of a key head.
    widths = [(heads.key_dim, heads.key_dim, values), (values,), (shared,), (shared,)]
    forms = {}
    for name, pair in zip(names, (slice(0, 2), slice(2, 4)), strict=True):
        parts: dict[str, Place] = {}
        end = 0
        for tensor, of_tensor in zip(tensors[pair], widths[pair], strict=True):
            ranges = []
            for width in of_tensor:
                ranges.append(slice(end, end + width))
                end += width
            parts[tensor.name] = RowsOfHeads(tensor.shape, heads.key_heads, tuple(ranges))
        forms[name.replace("{i}", i)] = StoredForm((heads.key_heads * end, config.hidden_size), parts)
    return forms
