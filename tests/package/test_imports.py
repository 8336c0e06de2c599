"""Imports go downward only, between the three packages and between the layers inside each package."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["pallas_kernels", "grinqh_jax", "checkpoints_tools"]
"""Lowest first."""

LAYERS = {
    "grinqh_jax": [
        {"errors"},
        {"memory", "json_files", "bundled", "companions", "ranges"},
        {"model"},
        {"sharding"},
        {"checkpoint", "hf", "text"},
        {"decoding"},
        {"serving"},
        {"evaluation", "benchmarking", "server"},
        {"cli"},
        {"generate", "__main__"},
    ],
    "checkpoints_tools": [
        {"source", "data"},
        {"calibration"},
        {"quantizers", "publish"},
        {"convert"},
        {"baselines", "export", "migrate"},
        {"pareto"},
    ],
}
"""The modules and subpackages of a package, lowest layer first. A member imports itself and lower layers."""

COMMAND_MODULES = {"command.py", "flags.py", "__main__.py"}
"""The files of ``checkpoints_tools`` that may import ``grinqh_jax.cli``. All others are library code."""

KERNEL_DEPENDENCIES = {
    "pallas_kernels",
    "jax",
    "jaxlib",
    "numpy",
    "jaxtyping",
    "ml_dtypes",
    *sys.stdlib_module_names,
}


def imports(package):
    """Yields ``(path, line, dotted name)`` of every name that the package imports, also inside functions."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield path, node.lineno, name


def members(package):
    """Returns the modules and subpackages directly inside a package, without its ``__init__``."""
    directories = {path.name for path in (ROOT / package).iterdir() if any(path.rglob("*.py"))}
    return directories | {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}


def place(path, line):
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package):
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    found = list(imports(package))
    assert found, f"no imports in {package}: is the test looking in the right place?"
    assert [(place(path, line), name) for path, line, name in found if name.split(".")[0] in above] == []


def test_the_kernels_depend_on_jax_and_numpy_only():
    found = imports("pallas_kernels")
    assert [
        (place(path, line), name)
        for path, line, name in found
        if name.split(".")[0] not in KERNEL_DEPENDENCIES
    ] == []


@pytest.mark.parametrize("package", LAYERS)
def test_every_member_of_a_package_has_a_layer(package):
    layers = LAYERS[package]
    assert set.union(*layers) == members(package)
    assert sum(map(len, layers)) == len(set.union(*layers))


@pytest.mark.parametrize("package", LAYERS)
def test_no_member_imports_its_own_layer_or_one_above(package):
    level = {member: index for index, layer in enumerate(LAYERS[package]) for member in layer}
    wrong, seen = [], 0
    for path, line, name in imports(package):
        importer = path.relative_to(ROOT / package).with_suffix("").parts[0]
        top, imported, *_ = [*name.split("."), ""]
        # The package root exports its public names and imports nothing until one of them is used.
        if top != package or importer == "__init__" or imported not in level:
            continue
        seen += 1
        if imported != importer and level[imported] >= level[importer]:
            wrong.append(f"{place(path, line)} imports {name}")
    assert seen > 20, f"only {seen} imports inside {package}: is the test looking in the right place?"
    assert wrong == []


def test_library_code_of_the_tools_does_not_import_the_command_line():
    found = [
        (path, line) for path, line, name in imports("checkpoints_tools") if name.startswith("grinqh_jax.cli")
    ]
    assert found, (
        "no command of checkpoints_tools uses grinqh_jax.cli: is the test looking in the right place?"
    )
    assert [place(path, line) for path, line in found if path.name not in COMMAND_MODULES] == []
