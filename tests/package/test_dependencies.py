"""The packages import exactly the libraries that pyproject.toml declares."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pallas_kernels", "grinqh_jax", "checkpoints_tools")
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "lm_eval": "lm-eval", "ml_dtypes": "ml-dtypes"}
"""Distribution of each imported module whose name differs from it."""

NOT_IMPORTED = {"jinja2"}
"""Declared for transformers, which renders chat templates with it but does not require it."""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def imported_distributions():
    modules = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    modules -= set(sys.stdlib_module_names) | set(PACKAGES)
    return {DISTRIBUTIONS.get(module, module) for module in modules}


def test_every_import_is_declared(project):
    extras = project["optional-dependencies"]
    declared = names([*project["dependencies"], *extras["eval"], *extras["gguf"], *extras["serve"]])
    assert imported_distributions() - declared == set()


def test_every_dependency_is_imported(project):
    assert names(project["dependencies"]) - imported_distributions() == NOT_IMPORTED


def test_the_upper_bounds_admit_what_is_installed(project):
    for requirement in project["dependencies"]:
        name, bounds = re.match(r"([\w.-]+)(.*)", requirement).groups()
        for bound in re.findall(r"<([\d.]+)", bounds):
            installed = importlib.metadata.version(name)
            assert _numbers(installed) < _numbers(bound), f"{name} {installed} is outside {bounds}"


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
