"""What every test shares: run-time checks of the annotated shapes, and the assets beside the repository."""

import os
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

# Before the packages are imported: their jaxtyping annotations (shapes, dtypes) are checked at every call.
# A NumPy array may stand wherever an array may. Not pallas_kernels.weight and .activations: the
# fields of a pytree may hold shapes, shardings or anything else that a tree_map makes of it.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(
    [
        "checkpoints_tools.calibration",
        "checkpoints_tools.principal_basis",
        "checkpoints_tools.quantize_linear",
        "checkpoints_tools.source_layer",
        "grinqh_jax.dial",
        "grinqh_jax.norm",
        "grinqh_jax.rope",
        "grinqh_jax.thresholds",
        "pallas_kernels.codes",
        "pallas_kernels.grading",
        "pallas_kernels.matvec.api",
        "pallas_kernels.matvec.reference",
        "pallas_kernels.matvec.xla",
    ],
    "beartype.beartype",
)


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
