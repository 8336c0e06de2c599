"""Command lines of conversions, and the content of their output."""

import json
from pathlib import Path


def arguments(model: Path, out: Path, calib: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--out", str(out), "--calib", str(calib), *more]


def content(out: Path) -> dict[str, bytes]:
    """Returns the metadata and the leaves of a checkpoint, without the random file names of Orbax."""
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    leaves = json.loads((out / "manifest.json").read_text())["leaves"]
    return {name: (out / name).read_bytes() for name in files} | {"leaves": leaves}
