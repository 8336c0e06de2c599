"""The files beside a model's configuration and weights: tokenizer, chat templates, generation defaults."""

from pathlib import Path

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Names of the companions in a model's directory."""

CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of named chat templates, ``<name>.jinja``, which are companions, too."""


def find_companions(directory: Path) -> list[Path]:
    """Returns the paths of the companions in a model's directory."""
    files = [path for name in COMPANIONS if (path := directory / name).is_file()]
    return files + sorted((directory / CHAT_TEMPLATES).glob("*.jinja"))


def companion_path(file: Path, directory: Path) -> Path:
    """Returns the path for a copy of the companion ``file`` in ``directory``, and creates its folder."""
    if file.parent.name != CHAT_TEMPLATES:
        return directory / file.name
    (directory / CHAT_TEMPLATES).mkdir(exist_ok=True)
    return directory / CHAT_TEMPLATES / file.name
