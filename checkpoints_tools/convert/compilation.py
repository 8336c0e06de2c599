"""Less compilation for a conversion, whose programs run a few dozen times: the cache and XLA's flags."""

import hashlib
import os
import platform
from pathlib import Path

import jax

GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
"""XLA would compile and time dozens of variants of every product (jax 0.11.2). The products of a conversion
run too briefly to win that time back. With the same variants in every run, two runs also write the same
bytes."""


def prepare() -> None:
    """Keeps compiled programs in the user's cache directory and sets ``GPU_FLAGS``.

    The user's choices win: ``JAX_COMPILATION_CACHE_DIR``, and a flag in ``XLA_FLAGS``. Call it before the
    first JAX computation of the process, because XLA reads its flags only once.
    """
    if Path("/dev/nvidiactl").exists():
        os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    directory = cache_directory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and _is_writable(directory):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def with_gpu_flags(flags: str) -> str:
    """Returns the value of ``XLA_FLAGS`` with those of ``GPU_FLAGS`` that it does not set."""
    missing = [flag for flag in GPU_FLAGS if flag.partition("=")[0] not in flags]
    return " ".join([*flags.split(), *missing])


def cache_directory() -> Path:
    """Returns the directory of compiled programs: one for each kind of CPU, whose instructions they use."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "grinqh-jax" / f"programs-{_cpu()}"


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


def _cpu() -> str:
    """Returns a digest of the instructions that this CPU knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {known}".encode()).hexdigest()[:12]
