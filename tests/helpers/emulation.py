"""Runs the lane program on the numpy emulator."""

import numpy as np

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu.kernel import geometry_of
from pallas_kernels.matvec.mosaic_gpu.program import Refs, graded_matvec_program


def emulate(
    x, weight: NestedWeight, thresholds, config: Config, squares=None, eps=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """``(y, realised bits)`` as ``graded_matvec`` returns them.

    Fails if an output is left unwritten, or the largest ``|x|`` is not what numpy says.
    """
    inputs = Activations.of(x, squares, eps=eps)
    geometry = geometry_of(inputs, weight, config)
    squares = thresholds if squares is None else squares
    gains = np.ones(weight.num_planes, np.float32) if weight.level_gains is None else weight.level_gains
    isa = NumpyInstructions(
        blocks=geometry.blocks, threads=geometry.threads, shared_bytes=geometry.shared_bytes
    )
    unwritten = np.float32(12345.678)
    partials = np.full((geometry.slice_groups, geometry.rows, geometry.stored_n), unwritten)
    reading = np.full((geometry.rows, 2), unwritten)
    inputs = [np.array(a) for a in (x, thresholds, squares, gains, weight.planes, weight.scales)]
    refs = Refs(*(isa.array(a) for a in (*inputs, partials, reading)), shared=None)
    graded_matvec_program(isa, geometry, refs)
    isa.finish()
    assert not (partials == unwritten).any()
    assert not (reading == unwritten).any()
    largest = np.abs(inputs[0].astype(np.float64)).max(1)
    if geometry.squares:
        largest = largest / np.sqrt(squares.astype(np.float64).sum(1) + eps)
    np.testing.assert_allclose(reading[:, 1], largest, rtol=1e-6)
    y = partials.astype(np.float64).sum(0)[:, : weight.out_features]
    return y, reading[:, 0]
