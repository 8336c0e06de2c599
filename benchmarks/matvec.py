"""Times the graded matvec kernel, checks it against float64, and compares it with bf16 and int4 kernels.

    python benchmarks/matvec.py --output benchmarks/results/matvec.json     one Qwen3-8B layer, batch 1
    python benchmarks/matvec.py --shapes 4096x4096 --bits 3 --rows 4
    python benchmarks/matvec.py --configs all --bits 2 3 4 --no-baselines \\
        --tune pallas_kernels/matvec/mosaic_gpu/measured.json                find the best configurations

Kernel times are medians from the profiler, over weights that rotate through several times the L2. In a
model, the next operation adds up the partial sums of the thread blocks. Here a separate kernel does, and its
time is listed separately ("sum"). The share of channels that reaches each level is fixed (LEVEL_SHARES); x is
Gaussian.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pallas_kernels import Activations, NestedWeight, codes, grading, layout
from pallas_kernels.matvec import mosaic_gpu
from pallas_kernels.matvec.mosaic_gpu import kernel
from pallas_kernels.matvec.mosaic_gpu.tuning import PARTIAL_OVERHEAD

LAYER = ("4096x6144", "4096x4096", "4096x24576", "12288x4096")
"""The projections of a Qwen3-8B layer: qkv, o, gate_up, down."""

LEVEL_SHARES = {
    2: (0.65, 0.25, 0.08, 0.02),
    3: (0.85, 0.48, 0.15, 0.02),
    4: (0.95, 0.70, 0.30, 0.05),
    8: (1.0, 1.0, 1.0, 1.0),
}
"""Mean bits -> shares of the channels that reach levels 1, 2, 3 and 4."""

ROTATED_BYTES = 250e6
"""Least number of bytes that a pass over the weights reads at 2 bits: 4 times the L2 of an H200."""

KERNEL_NAME = "graded_matvec_kernel"


def thresholds_for(x: np.ndarray, bits: int) -> np.ndarray:
    """Returns float32 thresholds ``[rows, 4]`` that give ``x [rows, K]`` the shares of ``bits`` exactly."""
    ordered = np.sort(np.abs(x), axis=1)[:, ::-1]
    k = x.shape[1]
    counts = [round(share * k) for share in LEVEL_SHARES[bits]]
    return np.stack([ordered[:, c - 1] if c < k else np.zeros(len(x)) for c in counts], 1).astype(np.float32)


def random_weights(k: int, n: int, count: int | None = None) -> list[NestedWeight]:
    """Returns ``count`` random weights, or enough to exceed the L2. Their codes do not affect the time."""
    if count is None:
        count = max(4, round(ROTATED_BYTES / (k * n * 2.125 / 8)))
    sizes = NestedWeight.abstract(k, n)
    make = jax.jit(
        lambda key: NestedWeight(
            jax.random.bits(key, sizes.planes.shape, jnp.uint32),
            jax.random.uniform(key, sizes.scales.shape, jnp.float32, 0.5, 1.5).astype(jnp.float16),
            k,
            n,
        )
    )
    return [make(jax.random.key(i)) for i in range(count)]


def relative_error(y: jax.Array, x: jax.Array, weight: NestedWeight, thresholds: jax.Array) -> float:
    """Returns the largest ``||y - exact|| / ||exact||`` over rows, with ``exact`` in float64."""
    errors = []
    for row, limits, got in zip(x, thresholds, y, strict=True):
        w = codes.dequantize(weight, grading.levels(row, limits))  # exact in float32
        with jax.enable_x64(True):
            exact = np.asarray(jnp.sum(row.astype(jnp.float64)[:, None] * w.astype(jnp.float64), axis=0))
        errors.append(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))
    return float(max(errors))


def bytes_read(x: np.ndarray, limits: np.ndarray, k: int, n: int) -> int:
    """Returns the bytes that a launch must read: plane rows that an activation row reaches, scales, x."""
    reached = ~(np.abs(x)[:, :, None] < limits[:, None, :])
    stored_k, stored_n = layout.padded_shape(k, n)
    return int(reached.any(0).sum() * (stored_n // 4) + stored_k // layout.GROUP * stored_n * 2 + x.nbytes)


def measure(k, n, bits_list, rows, config, bandwidth) -> list[dict]:
    """Times and checks one configuration of the kernel on one shape at several mean bits."""
    weights = random_weights(k, n)
    x = np.random.default_rng(k + n).standard_normal((rows, k)).astype(np.float32)
    geometry = kernel.geometry_of(Activations.of(jnp.asarray(x)), weights[0], config)

    @jax.jit
    def all_weights(x, thresholds, weights):
        return [kernel.graded_matvec(x, w, thresholds, config=config) for w in weights]

    results = []
    for bits in bits_list:
        limits = thresholds_for(x, bits)
        args = jnp.asarray(x), jnp.asarray(limits)
        y, realised = all_weights(*args, weights)[0]
        error = relative_error(y, args[0], weights[0], args[1])
        again = all_weights(*args, weights)[0][0]
        durations = timing.profile(lambda args=args: all_weights(*args, weights))
        mine = timing.Times.of([d for name, ds in durations.items() if KERNEL_NAME in name for d in ds])
        others = sum(sum(ds) for name, ds in durations.items() if KERNEL_NAME not in name)
        moved = bytes_read(x, limits, k, n)
        results.append(
            {
                "shape": f"{k}x{n}",
                "rows": rows,
                "bits": bits,
                "realised_bits": float(np.mean(realised)),
                "config": config.__dict__,
                "partial_sums": geometry.splits,
                "kernel_us": round(mine.median, 3),
                "kernel_quartiles_us": [round(q, 3) for q in mine.quartiles],
                "launches": mine.launches,
                "sum_us": round(others / mine.launches, 3),
                "bytes": moved,
                "share_of_read_bandwidth": round(moved / mine.median * 1e6 / bandwidth, 4),
                "relative_error": error,
                "deterministic": bool(jnp.array_equal(y, again)),
            }
        )
        print(
            f"{k}x{n} rows {rows} {bits} bits {tuple(config.__dict__.values())}: {mine.median:.2f} us "
            f"[{mine.quartiles[0]:.2f}, {mine.quartiles[1]:.2f}] + sum {others / mine.launches:.2f}, "
            f"{moved / mine.median / 1e6:.2f} TB/s, error {error:.1e}"
            + ("" if results[-1]["deterministic"] else " NOT DETERMINISTIC"),
            flush=True,
        )
    return results


def xla_bf16(k: int, n: int) -> float:
    """Returns the kernel time of XLA's bf16 ``[1, k] @ [k, n]`` over rotated weights, microseconds."""
    count = max(4, round(2 * ROTATED_BYTES / (k * n * 2)))
    weights = [jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16) for i in range(count)]
    x = jax.random.normal(jax.random.key(1000), (1, k), jnp.bfloat16)
    all_weights = jax.jit(lambda x, ws: [x @ w for w in ws])
    repeats = 5
    durations = timing.profile(lambda: all_weights(x, weights), repeats)
    return sum(sum(ds) for ds in durations.values()) / (repeats * count)


def torch_int4(shapes: list[str]) -> dict[str, float] | None:
    """Runs ``torch_int4.py``; returns None if PyTorch is missing or its kernel fails."""
    script = pathlib.Path(__file__).with_name("torch_int4.py")
    process = subprocess.run([sys.executable, script, *shapes], capture_output=True, text=True, check=False)
    if process.returncode:
        print("PyTorch int4 not measured:", process.stderr.strip().splitlines()[-1:], flush=True)
        return None
    return json.loads(process.stdout)


def version(package: str) -> str | None:
    """Returns the version of an installed package, or None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def all_configs() -> list[mosaic_gpu.Config]:
    """Returns all configurations worth trying."""
    choices = itertools.product((1, 2), (1, 2, 4), (4, 8))
    return [mosaic_gpu.Config(warpgroups=g, warps_per_group=w, ring_slots=s) for g, w, s in choices]


def best_of(results: list[dict]) -> list[dict]:
    """Returns each shape's configuration with the least total time, as entries of ``measured.json``.

    The time includes the cost of the partial sums in the kernel that adds them up.
    """
    entries = []
    for shape in dict.fromkeys(r["shape"] for r in results):
        times: dict[str, float] = {}
        for r in results:
            if r["shape"] == shape:
                key = json.dumps(r["config"])
                time = r["kernel_us"] + PARTIAL_OVERHEAD * r["partial_sums"]
                times[key] = times.get(key, 0.0) + time
        k, n = layout.padded_shape(*map(int, shape.split("x")))
        best = min(times, key=times.__getitem__)
        entries.append({"stored_k": k, "stored_n": n, "config": json.loads(best)})
    return entries


def write_best(file: pathlib.Path, device: str, entries: list[dict]) -> None:
    """Writes the device's entries into ``measured.json`` and keeps those of other devices and shapes."""
    known = json.loads(file.read_text()) if file.exists() else {}
    new = [(e["stored_k"], e["stored_n"]) for e in entries]
    kept = [e for e in known.get(device, []) if (e["stored_k"], e["stored_n"]) not in new]
    known[device] = kept + entries
    devices = [
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"    {json.dumps(entry)}" for entry in entries_of_device)
        + "\n  ]"
        for name, entries_of_device in known.items()
    ]
    file.write_text("{\n" + ",\n".join(devices) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        default=LAYER,
        metavar="KxN",
        help="input x output channels (default: the projections of a Qwen3-8B layer)",
    )
    add(
        "--bits",
        nargs="+",
        type=int,
        default=[2, 3, 4, 8],
        choices=LEVEL_SHARES,
        help="mean bits (default: 2 3 4 8)",
    )
    add("--rows", nargs="+", type=int, default=[1], metavar="N", help="batch sizes, 1 to 8 (default: 1)")
    add(
        "--configs",
        default="best",
        metavar="CONFIGS",
        help="best, all, or a JSON list of Config fields (default: best)",
    )
    add("--no-baselines", action="store_true", help="time only the graded kernel")
    add("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    add("--tune", type=pathlib.Path, metavar="FILE", help="write the best configurations into this file")
    args = parser.parse_args()
    if args.tune and args.rows != [1]:
        parser.error("--tune needs one activation row; leave out --rows")

    device = jax.devices()[0]
    bandwidth = timing.read_bandwidth()
    print(f"{device.device_kind}, jax {jax.__version__}, reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    results = []
    for shape, rows in itertools.product(args.shapes, args.rows):
        k, n = map(int, shape.split("x"))
        if args.configs == "best":
            x, weight = jax.ShapeDtypeStruct((rows, k), jnp.float32), NestedWeight.abstract(k, n)
            configs = [kernel.geometry_of(jax.eval_shape(Activations.of, x), weight).config]
        elif args.configs == "all":
            configs = all_configs()
        else:
            configs = [mosaic_gpu.Config(**fields) for fields in json.loads(args.configs)]
        for config in configs:
            results += measure(k, n, args.bits, rows, config, bandwidth)
    report = {
        "device": device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "torch")},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "read_bandwidth_bytes_per_second": round(bandwidth),
        "kernel": results,
    }
    if args.configs == "best":
        for bits, rows in itertools.product(args.bits, args.rows):
            total = sum(r["kernel_us"] for r in results if r["bits"] == bits and r["rows"] == rows)
            print(f"sum over the shapes at {bits} bits, {rows} rows: {total:.1f} us", flush=True)
    if not args.no_baselines:
        report["xla_bf16_us"] = {s: round(xla_bf16(*map(int, s.split("x"))), 3) for s in args.shapes}
        report["torch_int4_us"] = torch_int4(list(args.shapes))
        print("XLA bf16:", report["xla_bf16_us"], "PyTorch int4:", report["torch_int4_us"], flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.tune:
        write_best(args.tune, device.device_kind, best_of(results))
    worst = max(r["relative_error"] for r in results)
    if not worst <= 1e-3 or not all(r["deterministic"] for r in results):
        sys.exit(f"wrong results: largest relative error {worst:.1e}")
    print(f"median error {statistics.median(r['relative_error'] for r in results):.1e}, largest {worst:.1e}")


if __name__ == "__main__":
    main()
