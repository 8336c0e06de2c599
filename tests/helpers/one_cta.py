"""An emulator of one CTA with two warps."""

from pallas_kernels.lanes.emulator import NumpyInstructions

WARPS = 2
THREADS = 32 * WARPS


def new_isa() -> NumpyInstructions:
    return NumpyInstructions(blocks=1, threads=THREADS, shared_bytes=4096)
