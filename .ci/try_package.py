"""Checks an installed grinqh-jax from outside the checkout: files, version, and README's first command.

Run it with the Python of the environment: ``python -I .ci/try_package.py README.md``.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = [
    "pallas_kernels/py.typed",
    "pallas_kernels/matvec/mosaic_gpu/measured.json",
    "grinqh_jax/py.typed",
    "grinqh_jax/benchmarking/shapes.json",
    "grinqh_jax/server/page.html",
    "grinqh_jax/bundled/qwen3-7m/manifest.json",
    "grinqh_jax/bundled/qwen3-7m/README.md",
    "checkpoints_tools/py.typed",
    "checkpoints_tools/data/calibration.txt",
    "checkpoints_tools/data/NOTICE",
    "checkpoints_tools/data/mixed/README.md",
    "checkpoints_tools/data/mixed/instructions.jsonl",
]
"""Files that are not Python modules and that an installation must have."""


def main(readme: Path) -> None:
    import grinqh_jax

    root = Path(grinqh_jax.__file__).parents[1]
    assert root.is_relative_to(sys.prefix), f"{root} is not the installed package"
    check_files(root)
    check_version(grinqh_jax.__version__)
    with tempfile.TemporaryDirectory() as directory:
        run(first_command(readme.read_text(encoding="utf-8")), directory)
        run("python -m checkpoints_tools.convert --help", directory)


def check_files(root: Path) -> None:
    """The installation holds all data files, all files of the bundled model, and the licence."""
    missing = [name for name in FILES if not (root / name).is_file()]
    model = root / "grinqh_jax/bundled/qwen3-7m"
    listed = json.loads((model / "manifest.json").read_text())["files"]
    missing += [str(model / name) for name in listed if not (model / name).is_file()]
    assert not missing, f"the package lacks {missing}"
    names = [path.name for path in importlib.metadata.files("grinqh-jax") or []]
    assert "LICENSE" in names, "the package lacks its licence"
    assert not [name for name in names if name.startswith("test_")], "the package holds tests"


def check_version(version: str) -> None:
    """Module, metadata and console script name the same version."""
    installed = importlib.metadata.version("grinqh-jax")
    assert version == installed, f"grinqh_jax.__version__ is {version}, the metadata's {installed}"
    printed = run("grinqh-jax --version", "/")
    assert printed.strip() == f"grinqh-jax {version}", printed


def first_command(readme: str) -> str:
    """Returns the first ``python -m grinqh_jax.generate ...`` in README, up to the end of its code block."""
    for block in re.findall(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE):
        if command := re.search(r"python -m grinqh_jax\.generate .*", block, re.DOTALL):
            return command[0].partition("\npip install")[0].strip()
    raise AssertionError("README has no command python -m grinqh_jax.generate")


def run(command: str, directory: str) -> str:
    """Runs a shell command with the environment's programs in ``directory`` and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        command, shell=True, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"exit code {done.returncode}"
    assert done.stdout.strip(), "the command printed nothing"
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
