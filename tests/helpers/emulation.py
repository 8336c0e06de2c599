"""Runs the lane program of the graded matvec on the emulator."""

import numpy as np

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu.kernel import geometry_of, run_program
from pallas_kernels.matvec.mosaic_gpu.program import Refs


def emulate(
    x, weight: NestedWeight, thresholds, config: Config, square_partials=None, eps=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(y, realised bits)`` as ``graded_matvec`` does.

    Fails if the program leaves an output unwritten, or if its largest ``|x|`` differs from NumPy's.
    """
    geometry = geometry_of(Activations.of(x, square_partials, eps=eps), weight, config)
    squares = thresholds if square_partials is None else square_partials
    gains = np.ones(weight.num_planes, np.float32) if weight.level_gains is None else weight.level_gains
    isa = NumpyInstructions(
        blocks=geometry.blocks, threads=geometry.threads, shared_bytes=geometry.shared_bytes
    )
    unwritten = np.float32(12345.678)
    partials = np.full((geometry.splits, geometry.rows, geometry.stored_n), unwritten)
    stats = np.full((geometry.rows, 2), unwritten)
    arrays = [np.array(a) for a in (x, thresholds, squares, gains, weight.planes, weight.scales)]
    refs = Refs(*(isa.array(a) for a in (*arrays, partials, stats)), shared=None)
    run_program(isa, geometry, refs)
    isa.finish()
    assert not (partials == unwritten).any()
    assert not (stats == unwritten).any()
    max_abs = np.abs(np.asarray(x, np.float64)).max(1)
    if square_partials is not None:
        max_abs = max_abs / np.sqrt(squares.astype(np.float64).sum(1) + eps)
    np.testing.assert_allclose(stats[:, 1], max_abs, rtol=1e-6)
    y = partials.astype(np.float64).sum(0)[:, : weight.out_features]
    return y, stats[:, 0]
