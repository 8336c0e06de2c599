"""Maps parameters to the Hugging Face tensors they are made of, and finds tensors that do not match."""

import dataclasses
from collections.abc import Iterable

from grinqh_jax.hf.llama import BASE, EMBEDDING, IGNORED_TENSORS, LM_HEAD, TENSOR_NAMES
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import HEAD, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face tensor that a parameter is made of.

    Attributes:
      name: Name of the tensor.
      shape: Shape that follows from the configuration.
    """

    name: str
    shape: tuple[int, ...]


def sources(config: ModelConfig) -> dict[str, list[Source]]:
    """Returns, for each parameter by our dotted name, the tensors it is made of, in the order of its outputs.

    A tied model has no ``lm_head.weight``; its ``lm_head.kernel`` is made of the embedding.
    """
    return {
        key: [Source(*pair) for pair in zip(_tensor_names(config, key), shapes, strict=True)]
        for key, shapes in parameter_shapes(config).items()
    }


def is_kernel(key: str) -> bool:
    """Whether a parameter is a matrix ``[in, out]``, which Hugging Face stores transposed."""
    return key.endswith(".kernel")


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, str]:
    """Returns the names that transformers gives stored tensors when it loads them, by stored name.

    If a stored name is not a tensor of the model, transformers tries it without the prefix ``model.`` and
    then with it. A checkpoint that was saved from the model without its head lacks the prefix.
    """
    known = {source.name for tensors in sources(_untied(config)).values() for source in tensors}
    return {
        name: next((n for n in (name, name.removeprefix(BASE), BASE + name) if n in known), name)
        for name in stored
    }


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
    for name in sorted(missing):
        remedy = " (if the embedding is the head, config.json needs tie_word_embeddings: true)"
        problems.append(f"tensor {name} is missing" + (remedy if name == LM_HEAD else ""))
    problems += [f"tensor {name} is not part of a {config.architecture} model" for name in extra]
    return problems


def _untied(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a model that also has a tensor for its head."""
    return dataclasses.replace(config, tie_word_embeddings=False)


def _tensor_names(config: ModelConfig, key: str) -> list[str]:
    """Returns the names of the tensors that the parameter ``key`` is made of."""
    if config.tie_word_embeddings and key == f"{HEAD}.kernel":
        key = "embed.embedding"
    if not key.startswith("layers."):
        return list(TENSOR_NAMES[key])
    _, i, parameter = key.split(".", 2)
    return [name.format(i=i) for name in TENSOR_NAMES[f"layers.{{i}}.{parameter}"]]
