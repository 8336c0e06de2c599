"""The facts about a source checkpoint that a model card states: its name and its licence."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from checkpoints_tools.source.gguf_file.checkpoint import metadata_of
from grinqh_jax.errors import GrinqhWarning
from grinqh_jax.hf import HFCheckpoint

CARD = "README.md"
"""Name of a model card."""

UNKNOWN = "unknown"
"""Licence of a source that states none."""

_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of a checkpoint.

    Attributes:
      name: Name of the model.
      hub_id: Its id on the hub, or None.
      license: Identifier of its licence in the hub's spelling, or ``UNKNOWN``.
      license_name, license_link: Name and address of a licence that is ``other``, or None.
      languages: Codes of the languages.
    """

    name: str
    hub_id: str | None = None
    license: str = UNKNOWN
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()


def origin_of(source: HFCheckpoint, model: str) -> Origin:
    """Collects the facts about a source from its model card, or from the metadata of a GGUF file.

    Warns with ``GrinqhWarning`` if the model card is damaged, and uses none of it.

    Args:
      source: Checkpoint that was converted.
      model: The directory, hub id or file that it was opened by.
    """
    if metadata := metadata_of(source):
        return _of_gguf(source, metadata)
    hub_id = None if Path(model).expanduser().exists() else model  # as ``hf.resolve`` does
    data = _card_metadata(source)
    return Origin(
        name=hub_id or source.directory.name,
        hub_id=hub_id,
        license=_text(data.get("license")) or UNKNOWN,
        license_name=_text(data.get("license_name")),
        license_link=_text(data.get("license_link")),
        languages=_texts(data.get("language")),
    )


def _of_gguf(source: HFCheckpoint, metadata: dict[str, Any]) -> Origin:
    url = metadata.get("general.source.repo_url") or metadata.get("general.source.url") or ""
    match = _HUB_URL.fullmatch(url)
    return Origin(
        name=source.directory.name,
        hub_id=match[1] if match else None,
        license=_text(metadata.get("general.license")) or UNKNOWN,
        license_name=_text(metadata.get("general.license.name")),
        license_link=_text(metadata.get("general.license.link")),
        languages=_texts(metadata.get("general.languages")),
    )


def _card_metadata(source: HFCheckpoint) -> dict[str, Any]:
    path = source.directory / CARD
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception as error:  # not UTF-8, not YAML, not a mapping: errors of several libraries
        reason = " ".join(str(error).split())
        warnings.warn(f"{path}: the metadata cannot be read ({reason:.120})", GrinqhWarning, stacklevel=3)
        return {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str))
