"""The packages import downward only: pallas_kernels <- grinqh_jax <- checkpoints_tools."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWEST_FIRST = ["pallas_kernels", "grinqh_jax", "checkpoints_tools"]
GROUND_FLOOR = {
    "pallas_kernels",
    "jax",
    "jaxlib",
    "numpy",
    "jaxtyping",
    "ml_dtypes",
    *sys.stdlib_module_names,
}


def imports(package):
    """``(where, top-level module)`` of every import statement of the package, those in functions included."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else [package]
            else:
                continue
            for name in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name.split(".")[0]


@pytest.mark.parametrize("package", LOWEST_FIRST)
def test_no_package_imports_one_above_it(package):
    above = LOWEST_FIRST[LOWEST_FIRST.index(package) + 1 :]
    found = list(imports(package))
    assert found, f"no imports found in {package}: is the test looking in the right place?"
    assert [(where, name) for where, name in found if name in above] == []


def test_the_ground_floor_needs_jax_and_numpy_only():
    assert [(where, name) for where, name in imports("pallas_kernels") if name not in GROUND_FLOOR] == []
