"""The PTX back end: every instruction lowers without a GPU, and agrees with the emulator on a GPU."""

import collections
import concurrent.futures

import instruction_programs as programs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.lanes import device, launch
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.lanes.instructions import Instructions

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="the PTX back end needs jax >= 0.11.2"
)
every_program = pytest.mark.parametrize("name", programs.PROGRAMS)

ULPS = {"divide": 3, "exp2": 3, "reciprocal": 3, "rsqrt": 3}
"""Largest difference between the back ends, in units in the last place. All other instructions are exact."""


def gpu_kernel(name):
    """Returns the program as a Pallas kernel ``u32 [threads, 8] -> u32 [threads, 4]``."""
    return launch.lane_kernel(
        "instruction_kernel",
        lambda isa, refs: programs.run(isa, programs.PROGRAMS[name], *refs),
        outputs=[jax.ShapeDtypeStruct((programs.THREADS, programs.OUTPUT_WORDS), jnp.uint32)],
        blocks=1,
        threads=programs.THREADS,
        shared_bytes=programs.SHARED_BYTES,
    )


def test_programs_use_every_instruction(monkeypatch):
    used = collections.Counter()

    def counting(instruction):
        real = getattr(NumpyInstructions, instruction)

        def call(*args, **kwargs):
            used[instruction] += 1
            return real(*args, **kwargs)

        return call

    for instruction in Instructions.__abstractmethods__:
        monkeypatch.setattr(NumpyInstructions, instruction, counting(instruction))
    for program in programs.PROGRAMS.values():
        programs.emulated(program)
    assert set(used) == set(Instructions.__abstractmethods__)


@needs_mosaic
@every_program
def test_lowers(name):
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h200)
    source = jax.ShapeDtypeStruct((programs.THREADS, programs.INPUT_WORDS), jnp.uint32)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(gpu_kernel(name)).trace(source).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.fixture(scope="module")
def compiled():
    """Futures of the programs for the GPU by name, compiled in parallel."""
    has_clusters = device.unsupported_reason(device.CLUSTERS) is None
    names = [name for name in programs.PROGRAMS if has_clusters or name not in programs.NEED_9_0]
    inputs = jnp.asarray(programs.inputs())
    lowered = [jax.jit(gpu_kernel(name)).lower(inputs) for name in names]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, [pool.submit(program.compile) for program in lowered], strict=True))


@pytest.mark.gpu
@every_program
def test_gpu_agrees_with_the_emulator(name, compiled):
    if name not in compiled:
        pytest.skip("needs compute capability 9.0")
    got = np.asarray(compiled[name].result()(jnp.asarray(programs.inputs()))[0])
    expected = programs.emulated(programs.PROGRAMS[name])
    difference = np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32))
    assert difference.max() <= ULPS.get(name, 0), (got, expected)
