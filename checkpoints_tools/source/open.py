"""Opens a source checkpoint of any supported format."""

import os
from pathlib import Path

from checkpoints_tools.source.gguf_file import open_gguf
from grinqh_jax.hf import HFCheckpoint, open_checkpoint

MODEL_HELP = "Hugging Face checkpoint with safetensors (directory or hub id), or a GGUF file"
"""Description of the flag ``--model`` of the commands that open a source."""


def open_source(model: str | os.PathLike[str]) -> HFCheckpoint:
    """Opens a GGUF file, or a directory or hub id with safetensors.

    Raises:
      GrinqhError: ``open_gguf`` or ``open_checkpoint`` raises it.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    return open_checkpoint(model)
