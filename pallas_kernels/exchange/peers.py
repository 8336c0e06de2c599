"""Which NVIDIA GPUs can access each other's memory, from the CUDA driver."""

import ctypes
import itertools
from collections.abc import Sequence

DRIVER = "libcuda.so.1"


def without_access(ordinals: Sequence[int]) -> tuple[int, int] | None:
    """Returns the first pair of CUDA devices of which one cannot access the other's memory.

    None if all can.

    Args:
      ordinals: Numbers of the devices among those that the process sees (``jax.Device.local_hardware_id``).

    Raises:
      OSError: The machine has no CUDA driver.
      RuntimeError: The driver has no such device.
    """
    driver = ctypes.CDLL(DRIVER)
    _check(driver.cuInit(0), "cuInit")
    handles = {}
    for ordinal in ordinals:
        handle = ctypes.c_int()
        _check(driver.cuDeviceGet(ctypes.byref(handle), ordinal), f"cuDeviceGet({ordinal})")
        handles[ordinal] = handle
    for device, peer in itertools.permutations(ordinals, 2):
        answer = ctypes.c_int()
        code = driver.cuDeviceCanAccessPeer(ctypes.byref(answer), handles[device], handles[peer])
        _check(code, f"cuDeviceCanAccessPeer({device}, {peer})")
        if not answer.value:
            return device, peer
    return None


def _check(code: int, call: str) -> None:
    if code:
        raise RuntimeError(f"{DRIVER}: {call} failed with error {code}")
