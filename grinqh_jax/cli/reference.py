"""Finds the model that ``perplexity`` compares with: the named one, the original, or the model itself."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from grinqh_jax.cli.generation import open_model
from grinqh_jax.errors import GrinqhError

if TYPE_CHECKING:  # importing it imports JAX
    from grinqh_jax.decoding.model_files import ModelFiles

SELF = "self"
"""Value of ``--reference`` for the model's own full precision."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model to compare with.

    Attributes:
      files: Files of the reference; None for the model itself.
      name: Its directory or hub id, or ``SELF``.
      description: Description of the comparison for a reader of the results.
    """

    files: "ModelFiles | None"
    name: str
    description: str


def find_reference(files: "ModelFiles", named: str | None) -> Reference:
    """Returns the reference of a model.

    Args:
      files: Files of the model.
      named: Value of ``--reference``; None selects the original if it still exists, else the model itself.

    Raises:
      GrinqhError: there is no model of that name, or it cannot be read.
    """
    if named not in (None, SELF):
        return Reference(open_model(named), named, named)
    if files.quantization is None:
        return Reference(
            None, SELF, "the model itself: KL is 0 and the ratio 1; --reference names another model"
        )
    own = f"this checkpoint's own {files.quantization.max_bits} bits"
    if named == SELF:
        return Reference(None, SELF, f"{own}, not the original")
    source = files.quantization.provenance.get("source")
    if not isinstance(source, str):
        reason = "config.json does not say where the original is"
    elif not Path(source).exists():
        reason = f"the original is no longer at {source}"
    else:
        try:
            original = open_model(source)
            if _same_shape(original.config, files.config):
                return Reference(original, source, f"the original, {source} (--reference self: {own})")
            reason = f"{source} holds another model now"
        except GrinqhError as error:
            reason = f"the original cannot be read: {error}"
    return Reference(
        None,
        SELF,
        f"{own}, so errors of those bits do not show: {reason}; name it with --reference DIR_OR_HUB_ID",
    )


def _same_shape(one, other) -> bool:
    """Whether two configurations describe the same model. A tied head may be untied in one of them."""
    return dataclasses.replace(one, tie_word_embeddings=False) == dataclasses.replace(
        other, tie_word_embeddings=False
    )
