"""Opens and loads a model, and prints the statistics of a generation, for ``generate`` and ``chat``."""

import contextlib
import os
import sys
from pathlib import Path

from grinqh_jax.cli import command


def open_model(model: str):
    """Returns the ``ModelFiles`` of ``--model``."""
    with command.status(f"opening {Path(model).name}"):  # imports JAX, and may ask the hub
        from grinqh_jax.decoding.model_files import ModelFiles

        return ModelFiles.open(model)


def load_generator(files, mesh=None):
    """Loads the weights of ``ModelFiles`` under a status line; returns the ``Generator``.

    Args:
      files: Files of the model.
      mesh: Mesh to cut the model among (``mesh.make_mesh``); None for one device.
    """
    with command.status(f"loading {files.directory.name}"):
        from grinqh_jax.decoding.generator import Generator

        return Generator.from_files(files, mesh=mesh)


def load_speculation(setting, generator):
    """Returns the ``Speculation`` of ``--speculate``, and loads its draft model; None without."""
    if setting is None:
        return None
    with command.status("loading the drafter"):
        from grinqh_jax.decoding.load_speculation import speculation_of

        return speculation_of(setting, generator)


def compiling() -> contextlib.AbstractContextManager[None]:
    """Returns a status line for the time in which a text is prepared, most of which is compilation."""
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    hint = "" if kept else " (JAX_COMPILATION_CACHE_DIR=DIR keeps the programs)"
    return command.status(f"compiling{hint}")


def print_statistics(statistics, interrupted: bool = False) -> None:
    """Prints the ``Statistics`` of a generation, and its warning if there is one, on stderr."""
    if interrupted:
        print("interrupted", file=sys.stderr)
    for line in statistics.lines():
        print(line, file=sys.stderr)
    if warning := statistics.warning():
        print(f"warning: {warning}", file=sys.stderr)
