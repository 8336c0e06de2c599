"""Runs the lane programs of the graded matvec and of the products of experts on the emulator."""

import dataclasses
from collections.abc import Callable

import numpy as np

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.expert_weights import NestedExperts
from pallas_kernels.experts import mosaic_gpu as experts_kernel
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu import Config
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.kernel import geometry_of, run_program
from pallas_kernels.matvec.mosaic_gpu.program import Refs


def emulate(
    x, weight: NestedWeight, thresholds, config: Config, square_partials=None, eps=0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(y, realised bits)`` as ``graded_matvec`` does.

    Fails if the program leaves an output unwritten, or if its largest ``|x|`` differs from NumPy's.
    """
    inputs = Activations.of(x, square_partials, eps=eps)
    geometry = geometry_of(inputs, weight, config)
    return _emulate(
        geometry, lambda isa, refs: run_program(isa, geometry, Refs(*refs)), [], inputs, weight, thresholds
    )


def emulate_experts(
    x, weight: NestedExperts, experts, thresholds, config: Config, square_partials=None, eps=0.0, repeats=1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(y, realised bits)`` as ``experts_matvec`` does, and checks what ``emulate`` checks."""
    inputs = Activations.of(x, square_partials, eps=eps, repeats=repeats)
    geometry = experts_kernel.geometry_of(
        inputs, weight, config, threshold_repeats=inputs.leading[0] // len(thresholds)
    )
    return _emulate(
        geometry,
        lambda isa, refs: experts_kernel.run_program(isa, geometry, refs),
        [np.asarray(experts, np.int32)],
        inputs,
        weight,
        thresholds,
    )


def _emulate(
    geometry: Geometry,
    program: Callable,
    first: list[np.ndarray],
    x: Activations,
    weight: NestedWeight | NestedExperts,
    thresholds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs ``program`` on its arguments: the arrays of ``first``, then those of the graded matvec."""
    squares = thresholds if x.square_partials is None else x.square_partials
    gains = np.ones(weight.num_planes, np.float32) if weight.level_gains is None else weight.level_gains
    isa = NumpyInstructions(
        blocks=geometry.blocks, threads=geometry.threads, shared_bytes=geometry.shared_bytes
    )
    unwritten = np.float32(12345.678)
    partials = np.full((geometry.splits, geometry.rows, geometry.stored_n), unwritten)
    stats = np.full((geometry.rows, 2), unwritten)
    arrays = [
        np.array(a) for a in (x.stored_values, thresholds, squares, gains, weight.planes, weight.scales)
    ]
    program(isa, [*(isa.array(a) for a in (*first, *arrays, partials, stats)), None])
    isa.finish()
    assert not (partials == unwritten).any()
    assert not (stats == unwritten).any()
    max_abs = np.abs(np.asarray(x.values, np.float64)).max(1)
    if x.square_partials is not None:
        max_abs = max_abs / np.sqrt(np.asarray(squares, np.float64).sum(1) + x.eps)
    np.testing.assert_allclose(stats[:, 1], max_abs, rtol=1e-6)
    y = partials.astype(np.float64).sum(0)[:, : weight.out_features]
    return y, stats[:, 0]


def alone(case, x, weight, thresholds, row, **norm):
    """Runs the program for one row, without the case's program for several rows, on one of the rows."""
    one = slice(row, row + 1)
    config = dataclasses.replace(case.config, byte_pairs=None, dense_rows=None)
    norm = {name: v[one] if name == "square_partials" else v for name, v in norm.items()}
    y, bits = emulate(x[one], weight, thresholds[one], config, **norm)
    return y[0], bits[0]
