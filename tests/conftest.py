"""What every test shares: run-time checks of the annotated shapes, and the assets beside the repository."""

import os
from pathlib import Path

# One cache of compiled programs for the whole run, subprocesses included, and for the next run. Set before
# JAX is imported, which reads it then.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import numpy as np
import pytest

# Before the packages are imported: their annotations, jaxtyping's shapes and dtypes among them, are checked
# at every call. A NumPy array may stand wherever an array may.
jaxtyping.Array = jax.Array | np.ndarray

# The fields of a pytree may hold shapes, shardings or anything else that a tree_map makes of it: they are not
# checked (jaxtyping asks a class for this mark before it checks its __init__), their methods are.
_register_dataclass = jax.tree_util.register_dataclass


def _register_with_free_fields(cls, *args, **kwargs):
    cls.__no_type_check__ = True
    return _register_dataclass(cls, *args, **kwargs)


jax.tree_util.register_dataclass = _register_with_free_fields

# Left out: what says nothing of arrays (lane programs, command lines); checkpoint.quantization, whose class
# checks itself what it is given from a file; hf, whose functions take whatever reads like a checkpoint.
jaxtyping.install_import_hook(
    [
        "checkpoints_tools.baselines",
        "checkpoints_tools.calibration",
        "checkpoints_tools.convert",
        "checkpoints_tools.quantizers",
        "checkpoints_tools.source.head",
        "checkpoints_tools.source.layer",
        "grinqh_jax.model.apply",
        "grinqh_jax.model.attention",
        "grinqh_jax.model.cache",
        "grinqh_jax.checkpoint.checksums",
        "grinqh_jax.json_files",
        "grinqh_jax.checkpoint.manifest",
        "grinqh_jax.checkpoint.reader",
        "grinqh_jax.checkpoint.writer",
        "grinqh_jax.model.decoder",
        "grinqh_jax.decoding.batch",
        "grinqh_jax.decoding.dial",
        "grinqh_jax.decoding.engine",
        "grinqh_jax.decoding.prefill_buckets",
        "grinqh_jax.decoding.prompt_cache",
        "grinqh_jax.evaluation",
        "grinqh_jax.model.flat_model",
        "grinqh_jax.decoding.generator",
        "grinqh_jax.model.layer_spec",
        "grinqh_jax.model.linear",
        "grinqh_jax.benchmarking.measure",
        "grinqh_jax.model.norm",
        "grinqh_jax.benchmarking.random_model",
        "grinqh_jax.model.output_projection",
        "grinqh_jax.model.rope",
        "grinqh_jax.decoding.sampling",
        "grinqh_jax.model.stacks",
        "grinqh_jax.decoding.statistics",
        "grinqh_jax.model.swiglu",
        "grinqh_jax.decoding.thresholds",
        "pallas_kernels.activations",
        "pallas_kernels.codes",
        "pallas_kernels.decode_attention.kernel",
        "pallas_kernels.decode_rows.kernel",
        "pallas_kernels.dequantization.kernel",
        "pallas_kernels.grading",
        "pallas_kernels.matvec.api",
        "pallas_kernels.matvec.mosaic_gpu.kernel",
        "pallas_kernels.matvec.reference",
        "pallas_kernels.matvec.xla",
        "pallas_kernels.weight",
    ],
    # An int may stand where a float may, as PEP 484 has it.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


pytest_plugins = ["byte_model", "character_model"]  # fixtures: tiny checkpoints


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory of models and texts too large for the repository: ``GRINQH_SHARED`` or ``../shared``.

    A test that needs it is skipped where it is absent, but fails in CI (environment ``CI`` set).
    """
    path = Path(os.environ.get("GRINQH_SHARED") or Path(__file__).parents[2] / "shared")
    if path.is_dir():
        return path
    reason = f"no models and texts at {path}: set GRINQH_SHARED to their directory"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
