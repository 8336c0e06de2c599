"""Times the attention kernels of a decode step at several cache lengths.

    python benchmarks/attention.py --output benchmarks/results/attention.json
    python benchmarks/attention.py --shapes Qwen3-8B --lengths 1056
    python benchmarks/attention.py --variants default same-share one-by-one --lengths 1056 4160
    python benchmarks/attention.py --page-size 64                        the cache in pages at random places
    python benchmarks/attention.py --positions 1 2 4 8 16                several new tokens of each sequence
    python benchmarks/attention.py --batch 1 --lengths 32000 131000 --capacity 131072 --layers 4

Kernel times are medians from the profiler, over the layers of a model whose caches together exceed the L2.
"""

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import report as reports
import timing
from report import compile_all, say

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.config import ModelConfig
from pallas_kernels import Activations
from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import SplitConfig

PARTS = 8
"""Number of partial sums that the qkv projection returns on an H200."""

VARIANTS = {
    "default": SplitConfig(),
    "same-share": SplitConfig(same_share_capacity=0),
    "equal-shares": SplitConfig(same_share_capacity=1 << 30),
    "large": SplitConfig(shared_limit=227 << 10),
    "one-by-one": SplitConfig(shared_limit=0),
}
"""Configurations of CTAs that attend to several splits; ``large`` needs compute capability 9.0 or 10.0."""

KERNELS = {
    "attention": "decode_attention_kernel",
    "merge": "merge_attention_kernel",
    "prepare": "prepare_attention_kernel",
}
"""Name in the profile of each launch. Only several new tokens are prepared by a launch."""


def all_layers(config: ModelConfig, variant: str, caches, qkv, norms, pages, positions):
    """Attends in all layers. Returns the outputs and the updated caches."""
    spec = config.layers[0].attention
    with mock.patch.object(kernel, "SPLIT_CONFIG", VARIANTS[variant]):  # It is read while this is traced.
        results = [
            attention.attend_heads(config, spec, qkv, norms, positions, KeyValues(*cache, pages))
            for cache in caches
        ]
    return [outputs for outputs, _ in results], [cache[:2] for _, cache in results]


def inputs(config: ModelConfig, batch: int, tokens: int, args: argparse.Namespace) -> list:
    """Returns the arguments of ``all_layers`` from ``caches`` to ``pages``."""
    dim, keys = config.head_dim, jax.random.split(jax.random.key(0), 2 * args.layers + 1)
    size, pages = (batch, args.capacity), None
    if args.page_size is not None:
        size = (batch * args.capacity // args.page_size, args.page_size)
        pages = jax.random.permutation(keys[-1], size[0]).reshape(batch, -1)
    size = (*size, config.num_kv_heads, dim)
    caches = [(_normal(keys[2 * i], size), _normal(keys[2 * i + 1], size)) for i in range(args.layers)]
    columns = (config.num_heads + 2 * config.num_kv_heads) * dim
    qkv = Activations.sums(jax.random.normal(keys[-1], (PARTS, batch, tokens, columns)), columns)
    norms = (jnp.ones(dim, jnp.bfloat16),) * 2 if config.layers[0].attention.head_norms else None
    return [caches, qkv, norms, pages]


def positions_of(batch: int, tokens: int, length: int) -> jax.Array:
    return jnp.full((batch, 1), length, jnp.int32) + jnp.arange(tokens)


def measure(program: Callable, arguments: list, positions: jax.Array) -> dict[str, timing.Times]:
    """Returns the times of the launches by the names in ``KERNELS``. Replaces the caches in ``arguments``."""

    def run():
        outputs, arguments[0] = program(*arguments, positions)
        return outputs

    durations = timing.profile(run)
    by_kernel = {
        label: [t for name, times in durations.items() if part in name for t in times]
        for label, part in KERNELS.items()
    }
    return {label: timing.Times.of(times) for label, times in by_kernel.items() if times}


def bytes_read(config: ModelConfig, batch: int, length: int, tokens: int, window: int | None) -> int:
    """Returns the bytes of keys and values that ``tokens`` new tokens of each sequence attend to."""
    used = length if window is None else min(length, window + tokens - 2)
    return 4 * batch * used * config.num_kv_heads * config.head_dim


def with_options(config: ModelConfig, head_dim: int | None, window: int | None) -> ModelConfig:
    """Returns a shape whose first layer has a window, and with other heads."""
    attention = dataclasses.replace(config.layers[0].attention, window=window)
    block = dataclasses.replace(config.layers[0].blocks[0], mixer=attention)
    layers = (dataclasses.replace(config.layers[0], blocks=(block, *config.layers[0].blocks[1:])),)
    return dataclasses.replace(config, layers=layers, head_dim=head_dim or config.head_dim)


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
        default=[1056, 4160, 8, 160, 500, 2048],
        metavar="N",
        help="tokens in the cache (default: 1056 4160 8 160 500 2048)",
    )
    batches = [1, 8, 16, 4, 2]
    add("--batch", nargs="+", type=int, default=batches, metavar="N", help="sequences (default: 1 8 16 4 2)")
    add("--variants", nargs="+", choices=VARIANTS, default=["default"], help="how CTAs divide several splits")
    add("--page-size", type=int, metavar="N", help="positions of a page (default: a contiguous cache)")
    add("--capacity", type=int, default=4224, metavar="N", help="cache slots (default: 4224)")
    add("--positions", nargs="+", type=int, default=[1], metavar="N", help="new tokens (default: 1)")
    add("--window", type=int, metavar="N", help="last positions that a token attends to (default: all)")
    add("--head-dim", type=int, metavar="N", help="channels of a head (default: those of the shape)")
    add("--layers", type=int, default=16, metavar="N", help="caches that are read in turn (default: 16)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, rows=[])
    for name, tokens in itertools.product(args.shapes, args.positions):
        config, name = random_model.shape(name), random_model.label(name)
        config = with_options(config, args.head_dim, args.window)
        for batch in args.batch:
            # One sequence has one split for each CTA.
            variants = args.variants if batch > 1 else args.variants[:1]
            if report.out_of_time(f"{name}, batch {batch}, {tokens} new"):
                continue
            arguments = inputs(config, batch, tokens, args)
            programs = compile_all(
                {v: jax.jit(functools.partial(all_layers, config, v), donate_argnums=0) for v in variants},
                dict.fromkeys(variants, (*arguments, positions_of(batch, tokens, args.lengths[0]))),
            )
            say(f"batch {batch}, {tokens} new: compiled {len(programs)} programs")
            for length, variant in itertools.product(args.lengths, variants):
                case = f"{name} {batch} x {length}, {tokens} new, {variant}"
                if report.out_of_time(case):
                    continue
                by_kernel = measure(programs[variant], arguments, positions_of(batch, tokens, length))
                read = bytes_read(config, batch, length, tokens, args.window)
                row = {
                    "shape": name,
                    "batch": batch,
                    "positions": tokens,
                    "length": length,
                    "variant": variant,
                }
                row |= {"capacity": args.capacity, "page_size": args.page_size, "bytes_read": read}
                row |= {"head_dim": config.head_dim, "window": args.window}
                for label, times in by_kernel.items():
                    row |= {f"{label}_us": round(times.median, 3), f"{label}_quartiles_us": times.quartiles}
                report.fields["rows"].append(row)
                times = ", ".join(f"{label} {row[f'{label}_us']} us" for label in by_kernel)
                say(f"{case}: {times}, {read / row['attention_us'] / 1e6:.2f} TB/s")
                report.save()
    report.finish()


if __name__ == "__main__":
    main()
