"""Times the attention kernels of a decode step at several cache lengths.

    python benchmarks/attention.py --output benchmarks/results/attention.json
    python benchmarks/attention.py --shapes Qwen3-8B --lengths 1056

Kernel times are medians from the profiler, over the layers of a model whose caches together exceed the L2.
"""

import argparse
import datetime
import json
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import timing

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.config import ModelConfig
from pallas_kernels import Activations

LAYERS = 16
PARTS = 8
"""Number of partial sums that the qkv projection returns on an H200."""

KERNELS = {"attention": "decode_attention_kernel", "merge": "merge_attention_kernel"}


def measure(config: ModelConfig, capacity: int, lengths: list[int]) -> Iterator[dict[str, timing.Times]]:
    """Yields, for each cache length, the times of the attention kernel and of the merge kernel."""
    dim, keys = config.head_dim, jax.random.split(jax.random.key(0), 2 * LAYERS + 1)
    size = (1, capacity, config.num_kv_heads, dim)
    caches = [KeyValues(_normal(keys[2 * i], size), _normal(keys[2 * i + 1], size)) for i in range(LAYERS)]
    columns = (config.num_heads + 2 * config.num_kv_heads) * dim
    qkv = Activations.sums(jax.random.normal(keys[-1], (PARTS, 1, 1, columns)), columns)
    spec = config.layers[0].attention
    norms = (jnp.ones(dim, jnp.bfloat16),) * 2 if spec.head_norms else None

    def all_layers(caches, positions):
        results = [attention.attend_heads(config, spec, qkv, norms, positions, cache) for cache in caches]
        return [outputs for outputs, _ in results], [cache for _, cache in results]

    step = jax.jit(all_layers, donate_argnums=0)

    def run():
        nonlocal caches
        outputs, caches = step(caches, positions)
        return outputs

    for length in lengths:
        positions = jnp.full((1, 1), length, jnp.int32)
        durations = timing.profile(run)
        yield {
            label: timing.Times.of([t for name, times in durations.items() if kernel in name for t in times])
            for label, kernel in KERNELS.items()
        }


def _normal(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
    return jax.jit(lambda key: jax.random.normal(key, size, jnp.bfloat16))(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        default=["Qwen3-8B"],
        metavar="NAME_OR_DIR",
        help="published shapes, or directories of models (default: Qwen3-8B)",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[8, 160, 500, 1056, 2048, 4160],
        metavar="N",
        help="tokens in the cache (default: 8 160 500 1056 2048 4160)",
    )
    add("--capacity", type=int, default=4224, metavar="N", help="cache slots (default: 4224)")
    add("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    rows = []
    for name in args.shapes:
        config, name = random_model.shape(name), random_model.label(name)
        for length, by_kernel in zip(args.lengths, measure(config, args.capacity, args.lengths), strict=True):
            read = 4 * length * config.num_kv_heads * config.head_dim
            row = {"shape": name, "length": length, "capacity": args.capacity, "bytes_read": read}
            for label, times in by_kernel.items():
                row |= {f"{label}_us": round(times.median, 3), f"{label}_quartiles_us": times.quartiles}
            rows.append(row)
            print(f"{name} {length}: {row['attention_us']} us, merge {row['merge_us']} us", flush=True)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
