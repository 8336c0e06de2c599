"""The memory figures describe this process alone."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grinqh_jax.memory import give_back_freed_memory, memory_in_use, peak_host_memory

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


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps freed memory that it can give back")
def test_memory_that_was_freed_below_a_block_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(64 << 10) for _ in range(MANY_BYTES // (64 << 10))]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks[:-1]:
        libc.free(block)
    kept = memory_in_use()
    give_back_freed_memory()
    given_back = kept - memory_in_use()
    libc.free(blocks[-1])
    assert given_back > MANY_BYTES // 2


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
