"""The mesh that ``--mesh`` names."""

import re

import jax

from grinqh_jax.errors import UsageError
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding.rules import obstacles

AUTO = "auto"
"""Setting that takes as many devices as the model can be cut among."""


def parse(text: str) -> int | None:
    """Returns the number of devices of ``tp=N``; None for ``auto``.

    Raises:
      UsageError: The text is neither.
    """
    if text == AUTO:
        return None
    match = re.fullmatch(rf"{AXIS}=([1-9]\d*)", text)
    if match is None:
        raise UsageError(f"mesh {text!r}: give {AXIS}=N, the number of devices, or {AUTO}")
    return int(match[1])


def make_mesh(text: str | None, config: ModelConfig) -> jax.sharding.Mesh | None:
    """Returns the mesh of a setting; None for one device.

    Args:
      text: ``tp=N``; ``auto`` for as many devices as there are and the model can be cut among; or None.
      config: Configuration of the model.

    Raises:
      UsageError: There are fewer devices, the model cannot be cut among so many, or a process has none.
    """
    if text is None:
        return None
    available, count = jax.devices(), parse(text)
    if count is None:
        fitting = [n for n in range(1, len(available) + 1) if n == 1 or not obstacles(config, n)]
        count = fitting[-1]
    if count > len(available):
        raise UsageError(
            f"--mesh {AXIS}={count}: there are {len(available)} devices; choose as many or fewer"
        )
    if count > 1 and (problems := obstacles(config, count)):
        raise UsageError(f"--mesh {AXIS}={count}: " + "; ".join(problems))
    if jax.process_count() > 1 and count != len(available):
        raise UsageError(
            f"--mesh {AXIS}={count}: {jax.process_count()} processes have {len(available)} devices, and all "
            "take part; start processes for as many devices as the mesh has"
        )
    if count == 1:
        return None
    automatic = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), (AXIS,), axis_types=automatic, devices=available[:count])
