"""Launches a lane program as a Pallas Mosaic GPU kernel.

Mosaic GPU is imported only when a kernel is built, because ``pallas_kernels`` must import with every jax,
also where the kernels cannot run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

WARPGROUP = 128
"""Number of threads in a warpgroup. Mosaic GPU launches whole warpgroups."""


def lane_kernel(
    name: str,
    program: Callable[[Any, Sequence[Any]], None],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    threads: int,
    shared_bytes: int,
    cluster: int = 1,
    peers: bool = False,
) -> Callable[..., Sequence[jax.Array]]:
    """Returns a function that runs a lane program on the GPU and returns its outputs.

    The arguments of the function are arrays, and ``jax.Ref``s, which the program may also write.

    Args:
      name: Name of the kernel in profilers and sanitizers.
      program: Lane program. It is called once, with the instructions and a list of refs: one for each
        argument, one for each output, and the shared memory.
      outputs: Shapes and dtypes of the outputs.
      blocks: Number of CTAs.
      threads: Number of threads in a CTA, a multiple of ``WARPGROUP``.
      shared_bytes: Bytes of shared memory in a CTA.
      cluster: Number of consecutive CTAs that form a cluster, a divisor of ``blocks``. More than one needs
        compute capability 9.0.
      peers: Whether the program addresses the memory of all devices of the mesh; its instructions are then
        ``PeerInstructions``. It starts on a device when it has all its inputs on all devices.
    """
    from jax.experimental.mosaic import gpu as mosaic_gpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.lanes.ptx import PeerPtxInstructions, PtxInstructions

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lanes(context, *refs):
            program(PeerPtxInstructions(context) if peers else PtxInstructions(context), refs)

        lanes(*refs)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=[plgpu.SMEM((shared_bytes,), jnp.int8)],
        grid=(blocks // cluster,),
        grid_names=("block",),
        cluster=() if cluster == 1 else (cluster,),
        cluster_names=() if cluster == 1 else ("rank",),
        num_threads=threads // WARPGROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            # Lane semantics pass the body to the compiler unchanged. The program places its own barriers.
            lowering_semantics=mosaic_gpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )
