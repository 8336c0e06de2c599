"""Device time of a layer's attention of a prefill chunk, by XLA and by cuDNN.

    python benchmarks/prompt_attention.py --chunks 2048x2048 512x4096 512x4096@1024

``512x4096`` are 512 new tokens at the end of a cache of 4,096 positions; ``512x4096@1024`` are the last ones
of 1,024 tokens in it.
"""

import argparse
import contextlib
import os
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import report as reports
import timing
from report import say

from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import attention, fused_attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.config import ModelConfig

REPEATS = 5
"""Number of profiled calls."""


def sizes_of(chunk: str) -> tuple[int, int, int]:
    """Returns the new tokens, the positions of the cache, and all tokens of a chunk ``TxS`` or ``TxS@N``."""
    tokens, _, cache = chunk.partition("x")
    positions, _, used = cache.partition("@")
    return int(tokens), int(positions), int(used or positions)


def arguments_of(config: ModelConfig, tokens: int, positions: int, used: int) -> list:
    """Returns the arguments of ``attention.attend`` for the last tokens of ``used`` ones in a cache."""
    keys = jax.random.split(jax.random.key(0), 5)
    new = [(1, tokens, heads, config.head_dim) for heads in (config.num_heads, *[config.num_kv_heads] * 2)]
    cached = [(1, positions, config.num_kv_heads, config.head_dim)] * 2
    arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, new + cached, strict=True)]
    return [*arrays[:3], jnp.arange(used - tokens, used)[None], KeyValues(*arrays[3:])]


def program(arguments: list, by_cudnn: bool) -> Callable:
    """Compiles an attention by cuDNN, if it can run, or by XLA.

    The lambda is a new function for each way, because JAX would reuse the trace of an old one.
    """
    by_xla = mock.patch.object(fused_attention, "lacks", return_value="this measures XLA")
    with contextlib.nullcontext() if by_cudnn else by_xla:
        return jax.jit(lambda *arguments: attention.attend(*arguments)).lower(*arguments).compile()


def measure(arguments: list, by_cudnn: bool) -> dict[str, float]:
    """Returns the microseconds of each kernel of an attention."""
    attend = program(arguments, by_cudnn)
    durations = timing.profile(lambda: attend(*arguments)[0], REPEATS)
    return {name: sum(times) / REPEATS for name, times in durations.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", metavar="NAME_OR_DIR", help="default: Qwen3-8B")
    chunks = ["2048x2048", "512x4096", "512x4096@1024", "512x512", "64x4096@64"]
    parser.add_argument(
        "--chunks", nargs="+", default=chunks, metavar="TxS[@N]", help="new tokens x positions @ all tokens"
    )
    reports.add_arguments(parser)
    args = parser.parse_args()
    config, report = random_model.shape(args.shape), reports.Report(args, rows=[])
    for chunk in args.chunks:
        arguments = arguments_of(config, *sizes_of(chunk))
        for way in ("xla", "cudnn"):
            if way == "cudnn" and (reason := fused_attention.lacks(arguments[0])) is not None:
                say(f"no cuDNN: {reason}")
                continue
            if report.out_of_time(f"{chunk}, {way}"):
                continue
            kernels = measure(arguments, way == "cudnn")
            row = {"shape": args.shape, "chunk": chunk, "way": way, "us": round(sum(kernels.values()), 1)}
            largest = sorted(kernels.items(), key=lambda item: -item[1])[:5]
            report.fields["rows"].append(row | {"kernels_us": {n: round(us, 1) for n, us in largest}})
            say(f"{chunk} {way}: {row['us']} us")
            report.save()
    report.finish()


if __name__ == "__main__":
    main()
