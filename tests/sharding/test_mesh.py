"""Runs ``mesh_cases`` and ``mesh_texts`` in a process with eight CPU devices; no other test needs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [Path(__file__).with_name(name) for name in ("mesh_cases.py", "mesh_texts.py")]


def run_cases(markers):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-m",
            markers,
            *map(str, FILES),
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=FILES[0].parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("markers", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_models_on_a_mesh_answer_as_on_one_device(markers):
    process = run_cases(markers)
    assert process.returncode == 0, process.stdout + process.stderr
