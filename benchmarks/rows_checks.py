"""The checks of ``rows``: every row against float64, and against the bits of the row alone."""

import statistics

import jax
import jax.numpy as jnp
import matvec
import numpy as np
from report import compile_all
from rows_programs import VARIANTS, config_of, draw_x, takes

from pallas_kernels import Activations, NestedWeight, codes, grading
from pallas_kernels.matvec.mosaic_gpu import Config, kernel

CHECKED_SHAPES = ((576, 1100), (2048, 2560), (1152, 4096))
CHECKED_BITS = (2, 3, 8)

RELATIVE_ERROR = 1e-3


def checked_variants(rows: int, names: list[str]) -> list[str]:
    """Returns the named variants to check for a number of rows."""
    return [name for name in names if VARIANTS[name] is not None and takes(VARIANTS[name], rows)]


def exact_rows(x: np.ndarray, weight: NestedWeight, thresholds: np.ndarray) -> np.ndarray:
    """Returns float64 ``[rows, N]``."""

    def one_row(row, limits):
        w = codes.dequantize(weight, grading.levels(row, limits))  # exact in float32
        return w[: weight.in_features, : weight.out_features]

    dequantize = jax.jit(one_row)
    out = []
    for row, limits in zip(x, thresholds, strict=True):
        w = dequantize(jnp.asarray(row), jnp.asarray(limits))
        with jax.enable_x64(True):
            out.append(np.asarray(jnp.asarray(row).astype(jnp.float64) @ w.astype(jnp.float64)))
    return np.stack(out)


def check(names: list[str], checked_rows: list[int], problems: list[str]) -> list[dict]:
    """Checks the named variants for these numbers of rows; appends a line for each failure."""
    checked_rows = sorted({1, *checked_rows})
    results = []
    bases = {
        shape: Config(warpgroups=warpgroups, warps_per_group=warps, ring_slots=8)
        for shape, (warpgroups, warps) in zip(CHECKED_SHAPES, ((1, 1), (2, 2), (2, 4)), strict=True)
    }
    functions, arguments = {}, {}
    weights = {shape: matvec.random_weights(*shape, count=1)[0] for shape in CHECKED_SHAPES}
    for shape in CHECKED_SHAPES:
        for rows in checked_rows:
            chosen = ["one row"] if rows == 1 else checked_variants(rows, names)
            for variant in chosen:
                config = bases[shape]
                if rows > 1:
                    config = config_of(config, VARIANTS[variant], rows, weights[shape])

                def run(x, w, t, config=config):
                    y, stats = kernel.partial_sums(Activations.of(x), w, t, config=config)
                    return y.partials, y.array, stats.bits

                key = shape, rows, variant
                functions[key] = run
                sizes = jnp.zeros((rows, shape[0]), jnp.float32), weights[shape], jnp.ones((rows, 4))
                arguments[key] = sizes
    programs = compile_all(functions, arguments)
    for shape in CHECKED_SHAPES:
        weight = weights[shape]
        for kind in ("random", "cauchy"):
            x = draw_x(max(checked_rows), shape[0], kind)
            others = draw_x(max(checked_rows), shape[0], kind, seed=1)
            for bits in CHECKED_BITS:
                limits = matvec.thresholds_for(x, bits)
                exact = exact_rows(x, weight, limits)
                one = programs[shape, 1, "one row"]
                alone = [one(x[r : r + 1], weight, limits[r : r + 1]) for r in range(len(x))]
                alone = [np.asarray(partials)[:, 0] for partials, _, _ in alone]
                for (of, rows, variant), program in programs.items():
                    if of != shape:
                        continue
                    partials, y, realised = [np.asarray(a) for a in program(x[:rows], weight, limits[:rows])]
                    norms = np.linalg.norm(exact[:rows], axis=1)
                    error = float((np.linalg.norm(y - exact[:rows], axis=1) / norms).max())
                    # The row in the middle with other companions, which read other bits.
                    mixed, mixed_limits = others[:rows].copy(), matvec.thresholds_for(others[:rows], 3)
                    r = rows // 2
                    mixed[r], mixed_limits[r] = x[r], limits[r]
                    company = np.asarray(program(mixed, weight, mixed_limits)[0])[:, r]
                    same = all(
                        np.array_equal(bits_of(partials[:, r]), bits_of(alone[r])) for r in range(rows)
                    )
                    same = same and np.array_equal(bits_of(company), bits_of(alone[r]))
                    result = {
                        "shape": f"{shape[0]}x{shape[1]}",
                        "rows": rows,
                        "bits": bits,
                        "x": kind,
                        "variant": variant,
                        "relative_error": error,
                        "realised_bits": float(realised.mean()),
                        "same_bits_as_alone": same,
                    }
                    results.append(result)
                    if not same or not error <= RELATIVE_ERROR:
                        problems.append(f"check failed: {result}")
    for kind in ("random", "cauchy"):
        errors = [r["relative_error"] for r in results if r["x"] == kind]
        print(f"{kind}: {len(errors)} checks, largest error {max(errors):.2e}, median", end=" ")
        print(f"{statistics.median(errors):.2e}", flush=True)
    invariant = sum(r["same_bits_as_alone"] for r in results)
    print(
        f"batch invariance: {invariant} of {len(results)} checks have the bits of the row alone", flush=True
    )
    return results


def bits_of(array: np.ndarray) -> np.ndarray:
    """Returns the bits of float32 numbers, so that signs of zeros and NaN count."""
    return np.ascontiguousarray(array).view(np.uint32)
