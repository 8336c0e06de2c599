"""Replaces ``pallas_kernels.lanes.launch.lane_kernel``: kernels run on the emulator, outside of ``jit``."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lanes.emulator import NumpyInstructions


def lane_kernel(name, program, *, outputs, blocks, threads, shared_bytes, cluster=1):
    """Returns a function of arrays and refs that runs the program on the emulator and returns its outputs."""

    def run(*arguments):
        refs = [isinstance(a, jax.Ref) for a in arguments]
        pairs = zip(arguments, refs, strict=True)
        arrays = [np.array(a[...] if is_ref else a) for a, is_ref in pairs]
        results = [np.full(out.shape, np.nan, out.dtype) for out in outputs]
        isa = NumpyInstructions(blocks=blocks, threads=threads, shared_bytes=shared_bytes, cluster=cluster)
        program(isa, [*(isa.array(array) for array in (*arrays, *results)), None])
        isa.finish()
        for argument, array, is_ref in zip(arguments, arrays, refs, strict=True):
            if is_ref:
                argument[...] = jnp.asarray(array)
        return [jnp.asarray(result) for result in results]

    return run
