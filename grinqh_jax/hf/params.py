"""Maps parameters to the Hugging Face tensors they are made of, and finds tensors that do not match."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families import FAMILIES
from grinqh_jax.model.families.family import EMBEDDING, LM_HEAD
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import norms, parameter_shapes, projections

BASE = "model."
"""Prefix of all names but that of the head. Checkpoints saved from the model without its head lack it."""

TEXT_PREFIXES = {"model.language_model.": BASE, "language_model.model.": BASE, "language_model.": ""}
"""Prefixes of the text part of a model with a vision tower, and those of a model without one."""

VISION_TENSORS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual)\..*")
"""Tensors of a vision tower, which are not read."""

IGNORED_TENSORS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers in old checkpoints. They follow from the configuration, so they are not read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face tensor that a parameter is made of.

    Attributes:
      name: Name of the tensor.
      shape: Shape that follows from the configuration.
    """

    name: str
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=8)  # A reader asks for it at every parameter.
def sources(config: ModelConfig) -> dict[str, list[Source]]:
    """Returns, for each parameter by our dotted name, the tensors it is made of, in the order of its outputs.

    A tied model has no ``lm_head.weight``; its ``lm_head.kernel`` is made of the embedding.
    """
    return {key: _sources(config, key, shapes) for key, shapes in parameter_shapes(config).items()}


def from_tensors(config: ModelConfig, key: str, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a parameter that is made of Hugging Face's tensors, which are in the order of ``sources``.

    The parameter keeps the tensors' dtype, except that a norm scale with an offset is float32. If the tensors
    are those of some experts, the result is ``[experts, in, out]``.
    """
    if is_of_experts(config, key):
        parts = tensors_of_expert(config, key)
        experts = [np.concatenate(tensors[i : i + parts]) for i in range(0, len(tensors), parts)]
        return np.stack(experts).swapaxes(1, 2)
    value = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    if offset := _norm_offset(config, key):
        return value.astype(np.float32) + np.float32(offset)
    return value.T if is_kernel(key) else value


def to_tensors(config: ModelConfig, key: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors by name that ``from_tensors`` makes a parameter of."""
    tensors = sources(config)[key]
    if is_of_experts(config, key):
        value = np.concatenate(value, axis=1)  # [in, experts * out]
    rows = value.T if is_kernel(key) else value - np.asarray(_norm_offset(config, key), value.dtype)
    pieces = np.split(rows, np.cumsum([tensor.shape[0] for tensor in tensors])[:-1])
    named = {tensor.name: np.ascontiguousarray(piece) for tensor, piece in zip(tensors, pieces, strict=True)}
    return with_whole_shared_experts(config, named)


def is_kernel(key: str) -> bool:
    """Whether a parameter is a matrix ``[in, out]``, which Hugging Face stores transposed."""
    return key.endswith(".kernel")


def is_of_experts(config: ModelConfig, key: str) -> bool:
    """Whether a parameter is a kernel ``[experts, in, out]``."""
    return key in _kernels_of_experts(config)


@dataclasses.dataclass(frozen=True)
class Fused:
    """A stored tensor with the tensors of several experts of a layer.

    Some checkpoints have one of all routed experts. A shared expert that is wider than the others is several
    experts, whose tensors get names like ``shared_expert.down_proj.weight[0]``.

    Attributes:
      shape: Its shape: ``[experts, outputs, inputs]``, or ``[outputs, inputs]`` of a shared expert.
      parts: Index of each of its tensors, by name: a range of each axis.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, tuple[slice, ...]]

    def shape_of(self, part: str) -> tuple[int, int]:
        """Returns the shape ``[outputs, inputs]`` of a tensor."""
        outputs, inputs = self.parts[part][-2:]
        return outputs.stop - outputs.start, inputs.stop - inputs.start


@functools.lru_cache(maxsize=8)
def fused_experts(config: ModelConfig) -> dict[str, Fused]:
    """Returns, by name, the tensors that a checkpoint may have in place of those of single experts."""
    fused: dict[str, Fused] = {}
    for key in sorted(_kernels_of_experts(config)):
        tensors, names = sources(config)[key], _tensor_names(config, key)
        # "experts.{e}.gate_proj.weight" and "experts.{e}.up_proj.weight" are "experts.gate_up_proj".
        prefix, *_ = names[0].split(".{e}.")
        projections = [
            name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj") for name in names
        ]
        parts: dict[str, tuple[slice, ...]] = {}
        start = 0
        experts = (len(tensors) - len(_shared_names(config, key))) // len(names)
        for index, tensor in enumerate(tensors[: experts * len(names)]):
            start = 0 if index % len(names) == 0 else start
            expert, (outputs, inputs) = index // len(names), tensor.shape
            parts[tensor.name] = slice(expert, expert + 1), slice(start, start + outputs), slice(0, inputs)
            start += outputs
        shape = experts, sum(tensor.shape[0] for tensor in tensors[: len(names)]), tensors[0].shape[1]
        fused[f"{prefix}.{'_'.join(projections)}_proj"] = Fused(shape, parts)
        fused |= _wide_shared_expert(config, key)
    return fused


def _wide_shared_expert(config: ModelConfig, key: str) -> dict[str, Fused]:
    """Returns the stored tensors of a shared expert that is several experts; none if it is one."""
    count = _shared_experts(config)
    if count < 2:
        return {}
    names = _stored_shared_names(config, key)
    shapes = {source.name: source.shape for source in sources(config)[key]}
    fused = {}
    for name in names:
        shape = shapes[f"{name}[0]"]
        # The channels inside the expert are outputs of the first projection, and inputs of the second.
        cut = 0 if len(names) > 1 else 1
        parts = {
            f"{name}[{j}]": tuple(
                slice(j * size, (j + 1) * size) if axis == cut else slice(0, size)
                for axis, size in enumerate(shape)
            )
            for j in range(count)
        }
        whole = tuple(size * (count if axis == cut else 1) for axis, size in enumerate(shape))
        fused[name] = Fused(whole, parts)
    return fused


def with_whole_shared_experts(
    config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns tensors by the names of a checkpoint, with wide shared experts as one tensor each."""
    stored = dict(tensors)
    for key in _kernels_of_experts(config):
        for name, fused in _wide_shared_expert(config, key).items():
            if fused.parts.keys() <= stored.keys():
                whole = np.empty(fused.shape, stored[f"{name}[0]"].dtype)
                for part, index in fused.parts.items():
                    whole[index] = stored.pop(part)
                stored[name] = whole
    return stored


def tensors_of_expert(config: ModelConfig, key: str) -> int:
    """Returns the number of tensors that each expert's kernel is made of."""
    return len(sources(config)[key]) // config.num_experts


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, str]:
    """Returns the names that transformers gives stored tensors when it loads them, by stored name.

    If a stored name is not a tensor of the model, transformers tries it without the prefix ``model.`` and
    then with it. A checkpoint that was saved from the model without its head lacks the prefix. The text part
    of a model with a vision tower has one of ``TEXT_PREFIXES``.
    """
    known = {source.name for tensors in sources(_untied(config)).values() for source in tensors}
    known |= fused_experts(config).keys()

    def canonical(name: str) -> str:
        text = name
        if config.has_vision:
            prefix = next((prefix for prefix in TEXT_PREFIXES if name.startswith(prefix)), "")
            text = TEXT_PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        return next((n for n in (text, text.removeprefix(BASE), BASE + text) if n in known), name)

    return {name: canonical(name) for name in stored}


def mismatches(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], unreadable: frozenset[str] = frozenset()
) -> list[str]:
    """Returns a message for every difference between the tensors that ``config`` needs and a checkpoint's.

    A checkpoint of a tied model may store the embedding, the head, or both.

    Args:
      config: Configuration of the model.
      shapes: Shapes of the checkpoint's tensors, by canonical name.
      unreadable: Canonical names of tensors in files that could not be read, which the caller has reported.
    """
    expected = {
        source.name: source.shape for tensors in sources(_untied(config)).values() for source in tensors
    }
    problems = [
        f"tensor {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = expected.keys() - shapes.keys() - unreadable
    if config.tie_word_embeddings and not {EMBEDDING, LM_HEAD} <= missing:
        missing -= {EMBEDDING, LM_HEAD}
    elif config.tie_word_embeddings:
        missing -= {LM_HEAD}
    extra = sorted(name for name in shapes.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name))
    for pattern in FAMILIES[config.family].left_out.values():
        extra = [name for name in extra if not re.fullmatch(pattern, name)]
    if config.has_vision:
        extra = [name for name in extra if not VISION_TENSORS.fullmatch(name)]
    for name in sorted(missing):
        remedy = " (if the embedding is the head, config.json needs tie_word_embeddings: true)"
        problems.append(f"tensor {name} is missing" + (remedy if name == LM_HEAD else ""))
    problems += [f"tensor {name} is not part of a {config.family} model" for name in extra]
    return problems


def _untied(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a model that also has a tensor for its head."""
    return dataclasses.replace(config, tie_word_embeddings=False)


@functools.lru_cache(maxsize=8)
def _kernels_of_experts(config: ModelConfig) -> frozenset[str]:
    """Returns the names of the kernels of experts."""
    return frozenset(f"{name}.kernel" for name, p in projections(config).items() if p.of_experts)


def _norm_offset(config: ModelConfig, key: str) -> float:
    """Returns the number that is added to the tensor of a norm scale; 0 for other parameters."""
    norm = norms(config).get(key.removesuffix(".scale"))
    return 0.0 if norm is None else norm.offset


def _sources(config: ModelConfig, key: str, shapes: list[tuple[int, ...]]) -> list[Source]:
    """Returns the tensors that a parameter is made of.

    Args:
      config: Configuration of the model.
      key: Dotted name of the parameter.
      shapes: Shapes of its arrays (``parameters.parameter_shapes``), which a checkpoint may store fused.
    """
    names = _tensor_names(config, key)
    if is_of_experts(config, key):
        shared = _shared_names(config, key)
        routed = range(config.num_experts - _shared_experts(config))
        names = [name.format(e=e) for e in routed for name in names] + shared
    if len(names) == 1 < len(shapes):
        return [Source(names[0], (sum(shape[0] for shape in shapes), *shapes[0][1:]))]
    return [Source(name, shape) for name, shape in zip(names, shapes, strict=True)]


def _shared_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors that a shared expert adds to a kernel of experts."""
    names, count = _stored_shared_names(config, key), _shared_experts(config)
    return names if count == 1 else [f"{name}[{j}]" for j in range(count) for name in names]


def _stored_shared_names(config: ModelConfig, key: str) -> list[str]:
    _, i, parameter = key.split(".", 2)
    return [name.replace("{i}", i) for name in FAMILIES[config.family].shared_expert.get(parameter, ())]


def _shared_experts(config: ModelConfig) -> int:
    """Returns the number of experts that a shared expert is; 0 without one."""
    return 0 if config.mixture is None else config.mixture.shared


def _tensor_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors that the parameter ``key`` is made of."""
    if key.endswith(".bias"):
        kernel = _tensor_names(config, key.removesuffix("bias") + "kernel")
        return [name.removesuffix("weight") + "bias" for name in kernel]
    if config.tie_word_embeddings and key == f"{HEAD}.kernel":
        key = "embed.embedding"
    tensors = FAMILIES[config.family].tensors
    if not key.startswith("layers."):
        return list(tensors[key])
    _, i, parameter = key.split(".", 2)
    return [name.replace("{i}", i) for name in tensors[f"layers.{{i}}.{parameter}"]]
