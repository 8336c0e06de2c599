"""Maps parameters to the Hugging Face tensors they are made of.

The tensors of experts are those of single experts here, even if a checkpoint stores them together
(``stored_together``).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families import FAMILIES
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import norms, parameter_shapes, projections


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
    are those of some experts, the result has an axis of experts in front.
    """
    if is_of_experts(config, key):
        parts = tensors_of_expert(config, key)
        experts = [np.concatenate(tensors[i : i + parts]) for i in range(0, len(tensors), parts)]
        return np.stack(experts).swapaxes(1, 2) if is_kernel(key) else np.stack(experts)
    value = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    if offset := _norm_offset(config, key):
        return value.astype(np.float32) + np.float32(offset)
    return value.T if is_kernel(key) else value


def to_tensors(config: ModelConfig, key: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors by name that ``from_tensors`` makes a parameter of."""
    tensors = sources(config)[key]
    if is_of_experts(config, key):
        value = np.concatenate(value, axis=-1)  # [in, experts * out], or [experts * out]
    rows = value.T if is_kernel(key) else value - np.asarray(_norm_offset(config, key), value.dtype)
    pieces = np.split(rows, np.cumsum([tensor.shape[0] for tensor in tensors])[:-1])
    return {tensor.name: np.ascontiguousarray(piece) for tensor, piece in zip(tensors, pieces, strict=True)}


def is_kernel(key: str) -> bool:
    """Whether a parameter is a matrix ``[in, out]``, which Hugging Face stores transposed."""
    return key.endswith(".kernel")


def is_of_experts(config: ModelConfig, key: str) -> bool:
    """Whether a parameter has an axis of experts: a kernel ``[experts, in, out]``, or a bias."""
    return key in _of_experts(config)


def tensors_of_expert(config: ModelConfig, key: str) -> int:
    """Returns the number of tensors that each expert's kernel or bias is made of."""
    return len(sources(config)[key]) // config.num_experts


@functools.lru_cache(maxsize=8)
def _of_experts(config: ModelConfig) -> frozenset[str]:
    """Returns the names of the kernels of experts, and of their biases."""
    names = [name for name, p in projections(config).items() if p.of_experts]
    return frozenset(f"{name}.{leaf}" for name in names for leaf in ("kernel", "bias"))


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
    names = tensor_names(config, key)
    if is_of_experts(config, key):
        shared = shared_names(config, key)
        routed = range(config.num_experts - shared_experts(config))
        names = [name.format(e=e) for e in routed for name in names] + shared
    if len(names) == 1 < len(shapes):
        return [Source(names[0], (sum(shape[0] for shape in shapes), *shapes[0][1:]))]
    return [Source(name, shape) for name, shape in zip(names, shapes, strict=True)]


def shared_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors that a shared expert adds to a kernel of experts."""
    names = stored_shared_names(config, key)
    if not shared_expert_is_cut(config):
        return names
    return [f"{name}[{j}]" for j in range(shared_experts(config)) for name in names]


def stored_shared_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors of a shared expert in a checkpoint."""
    _, i, parameter = key.split(".", 2)
    return [name.replace("{i}", i) for name in FAMILIES[config.family].shared_expert.get(parameter, ())]


def shared_experts(config: ModelConfig) -> int:
    """Returns the number of experts that a shared expert is; 0 without one."""
    return 0 if config.mixture is None else config.mixture.shared


def shared_expert_is_cut(config: ModelConfig) -> bool:
    """Whether there is a shared expert of another width than the others."""
    return shared_width(config) not in (0, config.expert_size)


def shared_width(config: ModelConfig) -> int:
    """Returns the width of the shared expert; 0 without one."""
    return 0 if config.mixture is None else config.mixture.shared_width


def tensor_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors that the parameter ``key`` is made of."""
    if key.endswith(".bias"):
        kernel = tensor_names(config, key.removesuffix("bias") + "kernel")
        return [name.removesuffix("weight") + "bias" for name in kernel]
    if config.tie_word_embeddings and key == f"{HEAD}.kernel":
        key = "embed.embedding"
    tensors = FAMILIES[config.family].tensors
    if not key.startswith("layers."):
        return list(tensors[key])
    _, i, parameter = key.split(".", 2)
    return [name.replace("{i}", i) for name in tensors[f"layers.{{i}}.{parameter}"]]
