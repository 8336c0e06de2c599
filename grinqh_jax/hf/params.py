"""The Hugging Face tensors that make each parameter: their names, shapes and all mismatches."""

import dataclasses

from grinqh_jax.hf.llama import IGNORED_TENSORS, TENSOR_NAMES
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import HEAD, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face tensor that a parameter is made of.

    Attributes:
      name: Name of the tensor.
      shape: Shape that the configuration asks for.
    """

    name: str
    shape: tuple[int, ...]


def sources(config: ModelConfig) -> dict[str, list[Source]]:
    """Returns the tensors that make every parameter, by our dotted name and in the order of the outputs.

    A tied model has no ``lm_head.weight``; its ``lm_head.kernel`` is made of the embedding.
    """
    return {
        key: [Source(*pair) for pair in zip(_tensor_names(config, key), shapes, strict=True)]
        for key, shapes in parameter_shapes(config).items()
    }


def is_kernel(key: str) -> bool:
    """Whether a parameter is a matrix ``[in, out]``, the transpose of what Hugging Face stores."""
    return key.endswith(".kernel")


def mismatches(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], unreadable: frozenset[str] = frozenset()
) -> list[str]:
    """Returns every difference between the tensors that ``config`` asks for and those of a checkpoint.

    Args:
      config: Configuration of the model.
      shapes: Shapes of the checkpoint's tensors, by name.
      unreadable: Names that an index places in files that could not be read. They are not reported again.
    """
    expected = {source.name: source.shape for parts in sources(config).values() for source in parts}
    problems = [
        f"tensor {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = sorted(expected.keys() - shapes.keys() - unreadable)
    extra = sorted(name for name in shapes.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name))
    # A tied model may carry a copy of its head, which transformers ignores too.
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
    problems += [f"tensor {name} is missing" for name in missing]
    problems += [f"tensor {name} is not part of a {config.architecture} model" for name in extra]
    return problems


def _tensor_names(config: ModelConfig, key: str) -> list[str]:
    if config.tie_word_embeddings and key == f"{HEAD}.kernel":
        key = "embed.embedding"
    if not key.startswith("layers."):
        return list(TENSOR_NAMES[key])
    _, i, parameter = key.split(".", 2)
    return [name.format(i=i) for name in TENSOR_NAMES[f"layers.{{i}}.{parameter}"]]
