"""The choice between the kernel and XLA for the product at one level, from measurements on each GPU."""

import functools
import importlib.resources
import json

from pallas_kernels.lanes import device


def kernel_pays(rows: int, level: int) -> bool:
    """Returns whether the kernel was faster than XLA on the target device, for up to this many rows.

    XLA dequantizes a copy of the weight first. A device that was not measured runs XLA.

    Args:
      rows: Number of activation rows.
      level: Level of all input channels.
    """
    most_rows = measured().get(device.target_device().device_kind, {})
    return rows <= most_rows.get(str(level), 0)


@functools.cache
def measured() -> dict[str, dict[str, int]]:
    """Returns the largest number of rows for which the kernel is faster, by device and level.

    ``benchmarks/level_matmul.py --tune`` writes the file ``measured.json``.
    """
    return json.loads(importlib.resources.files(__package__).joinpath("measured.json").read_text())
