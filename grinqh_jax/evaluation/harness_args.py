"""Arguments that lm-evaluation-harness and its users give to every model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from grinqh_jax.errors import UsageError

_IGNORED = ("device", "max_batch_size", "trust_remote_code")
"""Arguments that the harness passes and that have no effect: JAX chooses the device, and code from a model's
repository is never run."""

_KNOWN = ("pretrained", "bits", "max_length", "max_gen_toks", "dtype")

_DTYPES = {"auto": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check(arguments: Mapping[str, Any]) -> None:
    """Raises UsageError, which names all of them, for arguments that are neither used nor ignored."""
    unknown = sorted(arguments.keys() - set(_IGNORED))
    if unknown:
        raise UsageError(f"unknown model_args {', '.join(unknown)} (known: {', '.join(_KNOWN)})")


def compute_dtype(dtype: Any) -> Any:
    """Returns the dtype for ``Generator.load``: None for ``auto``.

    Raises:
      UsageError: The decoder does not compute in this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"dtype {name}: expected {', '.join(_DTYPES)}")
    return _DTYPES[name]
