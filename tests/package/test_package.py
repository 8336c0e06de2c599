"""The public names are those that docs/stability.md lists, and the package is cheap to import."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grinqh_jax

STABILITY = Path(__file__).parents[2] / "docs" / "stability.md"


def listed_names():
    """Returns the dotted names in the first columns of the tables of docs/stability.md."""
    rows = re.findall(r"^\| `([\w.]+)` \|", STABILITY.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)) > 20
    return rows


@pytest.mark.parametrize("name", listed_names())
def test_every_listed_name_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    assert attribute == "BUNDLED_MODEL" or value.__doc__


@pytest.mark.parametrize("module", ["grinqh_jax", "grinqh_jax.checkpoint", "pallas_kernels"])
def test_a_package_exports_the_listed_names_and_no_others(module):
    listed = {name.rpartition(".")[2] for name in listed_names() if name.rpartition(".")[0] == module}
    assert set(importlib.import_module(module).__all__) == listed


def test_lazy_names_are_the_exported_ones():
    from grinqh_jax.decoding.generator import Generator

    assert grinqh_jax.Generator is Generator
    assert sorted(grinqh_jax.__all__) == sorted(grinqh_jax._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'generate_everything'"):
        _ = grinqh_jax.generate_everything


def test_the_version_needs_no_installation():
    root = str(Path(grinqh_jax.__file__).parents[1])
    command = [sys.executable, "-S", "-m", "grinqh_jax", "--version"]  # -S: no installed packages
    child = subprocess.run(command, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True)
    assert child.stdout == f"grinqh-jax {grinqh_jax.__version__}\n"


def test_flags_are_checked_before_jax_is_imported():
    code = (
        "import sys, grinqh_jax.__main__ as m\n"
        "for argv in (['generate', '--bits', 'x', '-p', 'a'], ['chat', '--help'], ['nothing']):\n"
        "    try: m.main(argv)\n"
        "    except SystemExit: pass\n"
        "print('jax' in sys.modules, file=sys.stderr)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.stderr.splitlines()[-1] == "False"
