"""The graded matvec as a Pallas Mosaic GPU kernel: one launch, and the sum of its partial results.

Mosaic GPU is imported only once a device asks for it: ``pallas_kernels`` itself must import, and decline
with a reason, on every JAX.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import layout
from pallas_kernels.matvec.mosaic_gpu import geometry as geometry_module
from pallas_kernels.matvec.mosaic_gpu import tuning
from pallas_kernels.matvec.mosaic_gpu.geometry import Config, Geometry
from pallas_kernels.matvec.mosaic_gpu.program import Refs, graded_matvec_program
from pallas_kernels.weight import NestedWeight

OLDEST_JAX = (0, 11, 2)
OLDEST_ARCHITECTURE = (8, 0)
OFFSET_LIMIT = 2**32
"""List entries address the planes with 32 bits."""

DEFAULT_MULTIPROCESSORS = 132
"""Where the device does not say (an H200's)."""

ANY_CONFIG = Config(warpgroups=1, warps_per_slice=4, ring_slots=4)
"""Completes a ``Geometry`` until the tuning is known."""


def supports(x: jax.Array, weight: NestedWeight) -> str | None:
    """None if this kernel runs for these arguments on the device being compiled for, else the reason."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"needs jax >= {'.'.join(map(str, OLDEST_JAX))}, this is {jax.__version__}"
    rows = x.shape[0]
    if not 1 <= rows <= geometry_module.MAX_ROWS:
        return f"takes 1 to {geometry_module.MAX_ROWS} rows, not {rows}"
    plane_bytes = 4 * weight.planes.size
    if plane_bytes > OFFSET_LIMIT:
        return f"addresses at most {OFFSET_LIMIT} bytes of planes, the weight has {plane_bytes}"
    return _device_problem(_target_device())


def graded_matvec(
    x: Float[Array, "rows k"],
    weight: NestedWeight,
    thresholds: Float[Array, "rows p"],
    units: Float[Array, "rows u"] | None = None,
    *,
    config: Config | None = None,
) -> tuple[Float32[Array, "rows n"], Float32[Array, "rows"]]:
    """See ``api.graded_matvec``; ``x [rows, K]``, ``thresholds [rows, P]``, ``units [rows, U]``, 1 to 8 rows.

    Args:
      config: the tuning, chosen by ``tuning.best_config`` if not given.
    """
    if units is None:
        units = jnp.ones((x.shape[0], 1), jnp.float32)
    geometry = dataclasses.replace(geometry_of(x, weight, config), units=units.shape[1])
    thresholds, units = thresholds.astype(jnp.float32), units.astype(jnp.float32)
    partials, bits = launch(geometry)(x, thresholds, units, weight.planes, weight.scales)
    return in_order_sum(partials)[:, : weight.out_features], bits


def geometry_of(x: jax.Array, weight: NestedWeight, config: Config | None = None) -> Geometry:
    """The launch for these arguments; ``config`` as in ``graded_matvec``."""
    stored_k, stored_n = layout.padded_shape(weight.in_features, weight.out_features)
    geometry = Geometry(
        in_features=weight.in_features,
        stored_k=stored_k,
        stored_n=stored_n,
        planes=weight.num_planes,
        rows=x.shape[0],
        x_dtype=x.dtype.name,
        config=config or ANY_CONFIG,
    )
    if config is None:
        device = _target_device()
        config = tuning.best_config(
            geometry, device_kind=device.device_kind, multiprocessors=_multiprocessors(device)
        )
    return dataclasses.replace(geometry, config=config)


def in_order_sum(partials: Float32[Array, "groups rows n"]) -> Float32[Array, "rows n"]:
    """Sum over the leading axis, first to last, whatever the compiler does with its neighbours.

    Written as single additions: they fuse into the operation that uses the sum, where a reduction would be
    a kernel of its own, and their order is fixed.
    """
    total = partials[0]
    for i in range(1, partials.shape[0]):
        total = total + partials[i]
    return total


@functools.cache
def launch(geometry: Geometry):
    """The kernel ``(x, thresholds, units, planes, scales) -> (partials, bits)``; see ``place.Refs``."""
    from jax.experimental.mosaic import gpu as mosaic_gpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.matvec.mosaic_gpu.ptx import PtxInstructions

    def graded_matvec_kernel(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def lanes(context, *refs):
            del context
            graded_matvec_program(PtxInstructions(), geometry, Refs(*refs))

        lanes(*refs)

    return plgpu.kernel(
        graded_matvec_kernel,
        out_type=[
            jax.ShapeDtypeStruct((geometry.slice_groups, geometry.rows, geometry.stored_n), jnp.float32),
            jax.ShapeDtypeStruct((geometry.rows,), jnp.float32),
        ],
        scratch_types=[plgpu.SMEM((geometry.shared_bytes,), jnp.int8)],
        grid=(geometry.blocks,),
        grid_names=("block",),
        num_threads=geometry.config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            # Lane semantics hand the body to the compiler as it is; the program has its own barriers.
            lowering_semantics=mosaic_gpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )


def _target_device():
    """The device being compiled for: that of the abstract mesh in use, else the default one."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        return jax.devices(default)[0]
    return default


def _multiprocessors(device) -> int:
    count = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    return count or DEFAULT_MULTIPROCESSORS


def _device_problem(device) -> str | None:
    """Why the kernel does not run there, or None."""
    if device.platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, the device is {device.platform}"
    if "NVIDIA" not in device.device_kind.upper():
        return f"needs an NVIDIA GPU, the device is {device.device_kind}"
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        architecture = tuple(int(part) for part in capability.split("."))
        if architecture < OLDEST_ARCHITECTURE:
            return f"needs compute capability 8.0 or later, {device.device_kind} has {capability}"
    return None
