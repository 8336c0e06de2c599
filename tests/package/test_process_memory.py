"""The memory figures describe this process alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from grinqh_jax.memory import memory_in_use, peak_host_memory

MANY_BYTES = 1 << 28
ACCURACY_BYTES = 8 << 20
"""The kernel counts resident pages per thread and adds them up now and then."""


def test_the_peak_remembers_memory_that_was_released():
    before = peak_host_memory()
    size = before - memory_in_use() + (128 << 20)
    block = np.ones(size, np.uint8)
    in_use = memory_in_use()
    del block
    assert peak_host_memory() >= in_use - ACCURACY_BYTES
    assert peak_host_memory() >= before + (100 << 20)
    assert memory_in_use() < in_use - size / 2


def test_the_peak_of_a_child_does_not_include_its_parent():
    # The parent of the measured process holds 256 MiB when it starts the process.
    measured = "from grinqh_jax.memory import peak_host_memory; print(peak_host_memory())"
    parent = (
        "import subprocess, sys\n"
        f"block = b'x' * {MANY_BYTES}\n"
        f"subprocess.run([sys.executable, '-c', {measured!r}], check=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", parent], env=environment, check=True, capture_output=True, text=True
    )
    assert 10e6 < int(run.stdout) < MANY_BYTES
