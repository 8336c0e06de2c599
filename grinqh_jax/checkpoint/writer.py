"""Writing a checkpoint part by part: bounded memory, resumable, and whole or not there at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grinqh_jax.checkpoint.quantization import QuantizationConfig


class Writer:
    """Writes one GRINQH checkpoint directory, part after part.

    Everything is written to the sibling directory ``<path>.partial`` and moved to ``path`` by one
    rename when it is complete, so whatever ``path`` holds is whole. If the process dies, a new
    ``Writer`` with the same ``fingerprint`` goes on where the old one stopped:

        with Writer(out, fingerprint=fingerprint, overwrite=force) as writer:
            for name, make_tree in parts:
                if name not in writer.parts:
                    writer.save_part(name, make_tree())
            writer.finalize(hf_config, quantization, files=[source / "tokenizer.json"])

    Args:
      path: the directory to make. Its parent is created if it is not there.
      fingerprint: any string that is equal for two conversions if, and only if, their parts are
        interchangeable: a hash of the source's files, the options and the converter's version.
      overwrite: replace a finished checkpoint at ``path`` (it stays in place until the new one is
        complete) and throw away a partial directory of another conversion. Without it both raise.

    Raises:
      CheckpointError: ``path`` exists, or ``<path>.partial`` belongs to another conversion, or another
        process is writing there now. The message says what to do.
    """

    def __init__(self, path: str | Path, *, fingerprint: str, overwrite: bool = False): ...

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that are complete, those of an interrupted run included."""

    def save_part(self, name: str, tree: Mapping[str, Any]) -> None:
        """Writes one part, completely or (if the process dies) not at all.

        Args:
          name: free, but unique and the same from run to run, e.g. ``layers.0``.
          tree: nested dictionary from the root of the state tree, e.g.
            ``{"layers": {"0": {"qkv": {"planes": ..., "scales": ...}}}}``, of numpy or JAX arrays.
            The array may be released when this returns.

        Raises:
          CheckpointError: the part, or one of its leaves, has been written already, or a float leaf
            holds NaN or Inf.
        """

    def finalize(
        self, config: Mapping[str, Any], quantization: QuantizationConfig, files: Iterable[str | Path] = ()
    ) -> Path:
        """Seals the checkpoint, moves it to ``path`` and returns that.

        Args:
          config: Hugging Face's ``config.json`` of the source model; ``quantization_config`` is set here.
          quantization: goes into ``config.json`` and fixes, with ``config``, which leaves must be there.
          files: files to copy along under their own names: tokenizer files, ``generation_config.json``,
            chat templates. Those that do not exist are an error.

        Raises:
          CheckpointError: leaves are missing, unexpected, or of another shape or dtype than
            ``decoder.abstract_tree`` asks for; all are named.
        """

    def close(self) -> None:
        """Gives up the lock on ``<path>.partial``, which stays for a later run. Idempotent."""

    def __enter__(self) -> "Writer": ...

    def __exit__(self, *exc_info: object) -> None: ...
