"""Launching a lane program as a Pallas Mosaic GPU kernel.

Mosaic GPU is imported only once a device asks for it: ``pallas_kernels`` itself must import, and decline
with a reason, on every JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lanes.instructions import Instructions

WARPGROUP = 128
"""Threads of a warpgroup, of which Mosaic GPU launches whole ones."""


def lane_kernel(
    name: str,
    program: Callable[[Instructions, Sequence[Any]], None],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    threads: int,
    shared_bytes: int,
) -> Callable[..., Sequence[jax.Array]]:
    """A function of arrays, or of ``jax.Ref``s to be changed in place, that runs the program on the GPU.

    Args:
      name: what profilers and sanitizers call the kernel.
      program: called once, with the instructions and one ref for each argument, then each output, then the
        shared memory.
      outputs: shapes and dtypes of the results.
      blocks: CTAs.
      threads: of a CTA, a multiple of ``WARPGROUP``.
      shared_bytes: shared memory of a CTA.
    """
    from jax.experimental.mosaic import gpu as mosaic_gpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.lanes.ptx import PtxInstructions

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lanes(context, *refs):
            del context
            program(PtxInstructions(), refs)

        lanes(*refs)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[plgpu.SMEM((shared_bytes,), jnp.int8)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=threads // WARPGROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            # Lane semantics hand the body to the compiler as it is; the program has its own barriers.
            lowering_semantics=mosaic_gpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )
