"""Matches the tensors of a checkpoint with those that its configuration asks for."""

import dataclasses
import re
from collections.abc import Iterable

from grinqh_jax.hf.params import sources
from grinqh_jax.hf.stored_together import stored_forms
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.families import FAMILIES
from grinqh_jax.model.families.family import EMBEDDING, LM_HEAD

BASE = "model."
"""Prefix of all names but that of the head. Checkpoints saved from the model without its head lack it."""

TEXT_PREFIXES = {"model.language_model.": BASE, "language_model.model.": BASE, "language_model.": ""}
"""Prefixes of the text part of a model with a vision tower, and those of a model without one."""

VISION_TENSORS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual)\..*")
"""Tensors of a vision tower, which are not read."""

IGNORED_TENSORS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers in old checkpoints. They follow from the configuration, so they are not read."""


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, str]:
    """Returns the names that transformers gives stored tensors when it loads them, by stored name.

    If a stored name is not a tensor of the model, transformers tries it without the prefix ``model.`` and
    then with it. A checkpoint that was saved from the model without its head lacks the prefix. The text part
    of a model with a vision tower has one of ``TEXT_PREFIXES``.
    """
    known = {source.name for tensors in sources(_untied(config)).values() for source in tensors}
    for name, form in stored_forms(config).items():
        known |= {name} if form.scales is None else {name, form.scales}

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
