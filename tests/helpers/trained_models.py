"""Fixture: a trained model that is not part of the package, as a GRINQH checkpoint."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def converted_32m(shared, tmp_path_factory) -> Path:
    """qwen3-32m, converted with the options that take the least time."""
    from checkpoints_tools.convert.command import main

    source, out = shared / "models" / "qwen3-32m", tmp_path_factory.mktemp("qwen3-32m") / "converted"
    options = [
        "--tokens",
        "2048",
        "--gains",
        "none",
        "--no-refit",
        "--split",
        "uniform",
        "--basis",
        "original",
    ]
    assert main(["--model", str(source), "--out", str(out), *options]) == 0
    return out
