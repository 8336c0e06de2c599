"""Model families: one file describes the layers of a family and names its tensors (``docs/families.md``)."""

from grinqh_jax.model.config_reader import ConfigReader
from grinqh_jax.model.families import (
    gemma,
    gpt_oss,
    granite,
    llama,
    mistral,
    olmo,
    phi3,
    qwen,
    qwen2_moe,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    smollm3,
)
from grinqh_jax.model.families.family import Family

_MODULES = (
    *(llama, qwen, qwen2_moe, qwen3_5, qwen3_moe, qwen3_next, gpt_oss),
    *(mistral, smollm3, granite, phi3, olmo, gemma),
)

FAMILIES: dict[str, Family] = {family.model_type: family for module in _MODULES for family in module.FAMILIES}
"""The supported families by ``model_type``."""


def family_of(reader: ConfigReader) -> Family:
    """Returns the family of the first supported architecture of a configuration, or of its model type.

    If there is none, notes a problem in ``reader`` and returns Llama, so that further problems are found.
    """
    names = reader.names("architectures")
    model_type = reader.values.get("model_type")
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    for name in names:
        if name in by_architecture:
            family = by_architecture[name]
            if model_type not in (None, family.model_type):
                # transformers follows the model type, which other programs may ignore.
                reader.problem(f"architecture {name} with model_type {model_type!r}, not {family.model_type}")
            return family
    if not names and isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    unsupported = f"architecture {', '.join(names)}" if names else f"model_type {model_type!r}"
    reader.problem(f"{unsupported} (supported: {', '.join(by_architecture)})")
    return FAMILIES["llama"]
