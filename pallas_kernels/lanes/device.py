"""The device that a program is compiled for, and whether it runs lane programs."""

import jax

OLDEST_JAX = (0, 11, 2)
"""Oldest jax whose Mosaic GPU has what the kernels use."""

FIRST_UNTESTED_JAX = (0, 13)
"""First jax that is refused, because Mosaic GPU is experimental. The ``gpu`` extra in pyproject.toml has the
same bound."""

OLDEST_ARCHITECTURE = (8, 0)
"""Oldest supported CUDA compute capability."""

CLUSTERS = (9, 0)
"""Oldest compute capability with clusters of CTAs."""

HOPPER_KINDS = ("NVIDIA H100", "NVIDIA H200")
"""Beginnings of the kinds of devices with compute capability 9.0."""

DEFAULT_MULTIPROCESSORS = 132
"""Number of multiprocessors of an H200, for devices that do not report theirs."""


def unsupported_reason(oldest: tuple[int, int] = OLDEST_ARCHITECTURE) -> str | None:
    """Returns why lane programs do not run on the target device, or None if they do.

    Args:
      oldest: Oldest compute capability that has all instructions of the program.
    """
    if jax.__version_info__ < OLDEST_JAX:
        return f"needs jax >= {'.'.join(map(str, OLDEST_JAX))}, this is {jax.__version__}"
    if jax.__version_info__ >= FIRST_UNTESTED_JAX:
        newest = ".".join(map(str, FIRST_UNTESTED_JAX))
        return f"is tested with jax < {newest}, this is {jax.__version__}: pip install 'grinqh-jax[gpu]'"
    device = target_device()
    if device.platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, the device is {device.platform}"
    if "NVIDIA" not in device.device_kind.upper():
        return f"needs an NVIDIA GPU, the device is {device.device_kind}"
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        architecture = tuple(int(part) for part in capability.split("."))
        if architecture < oldest:
            needed = ".".join(map(str, oldest))
            return f"needs compute capability {needed} or later, {device.device_kind} has {capability}"
    return None


def no_warpgroup_products_reason() -> str | None:
    """Returns why the target device lacks ``wgmma``, matrix products of warpgroups, or None if it has it.

    Only compute capability 9.0 has them, no later one. A device without a capability, of an abstract mesh, is
    judged by its kind.
    """
    device = target_device()
    capability = getattr(device, "compute_capability", None)
    if capability == "9.0" or (capability is None and device.device_kind.startswith(HOPPER_KINDS)):
        return None
    return f"needs compute capability 9.0, {device.device_kind} has {capability or 'another'}"


def target_device():
    """Returns the device that a program is compiled for.

    This is the device of the current abstract mesh, if it has one, else JAX's default device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # set when jax is imported
    if default is None or isinstance(default, str):
        return jax.devices(default)[0]
    return default


def multiprocessors(device) -> int:
    """Returns the number of multiprocessors of the device."""
    count = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    return count or DEFAULT_MULTIPROCESSORS


def shared_memory(device) -> int:
    """Returns the most bytes of shared memory that one CTA can have on the device."""
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return least_shared_memory(device.device_kind)
    return 1024 * {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}.get(capability, 99)


def least_shared_memory(device_kind: str) -> int:
    """Returns bytes of shared memory that one CTA can have on a device of this kind.

    They are the most for an H100 and an H200. Of other kinds nothing is known, and every GPU has 99 KiB.
    """
    return 1024 * (227 if device_kind.startswith(HOPPER_KINDS) else 99)
