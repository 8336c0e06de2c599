"""Compiled programs of a conversion are kept, unless the user decides otherwise."""

import os
import subprocess
import sys

import pytest

from checkpoints_tools.convert import compilation

PROGRAM = """
from checkpoints_tools.convert import compilation
compilation.prepare()
import jax
jax.jit(lambda x: 2 * x + 1)(1.0)
"""


def programs(tmp_path, **variables):
    """Runs a process that compiles a program; returns the entries of the default cache directory."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"} | variables
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    return list((tmp_path / "cache").glob("grinqh-jax/programs-*/*"))


def test_programs_are_kept_in_the_users_cache(tmp_path):
    assert programs(tmp_path)


def test_the_users_directory_wins(tmp_path):
    own = tmp_path / "own"
    assert not programs(
        tmp_path, JAX_COMPILATION_CACHE_DIR=str(own), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )
    assert list(own.iterdir())


def test_a_directory_that_cannot_be_made_is_not_used(tmp_path):
    (tmp_path / "file").touch()
    assert not programs(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))


@pytest.mark.parametrize("flags", ["", "--xla_gpu_autotune_level=4 --xla_dump_to=/tmp/x"])
def test_flags_for_gpus_are_added_to_those_of_the_user(flags):
    added = compilation.with_gpu_flags(flags).split()
    assert added[: len(flags.split())] == flags.split()
    assert sum("xla_gpu_autotune_level" in flag for flag in added) == 1
    assert "--xla_gpu_enable_triton_gemm=false" in added


def test_this_xla_knows_the_flags():
    """XLA ends a process that sets a flag it does not know."""
    program = "import jax; jax.jit(lambda x: 2 * x)(1.0)"
    environment = os.environ | {"XLA_FLAGS": compilation.with_gpu_flags(""), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
