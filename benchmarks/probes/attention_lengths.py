"""Times cuDNN's attention with a mask alone, with lengths, and with lengths in blocks of queries.

    python benchmarks/probes/attention_lengths.py

``512x4096 from 1024`` are the tokens 1,024 to 1,535 in a cache of 4,096 slots. A line has the microseconds of
all kernels, those of cuDNN, and the number of outputs whose bits differ from those with a mask alone.
"""

import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import timing

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CASES = (2048, 2048, 0), (512, 512, 0), (512, 4096, 512), (512, 8192, 0), (512, 4096, 3584), (64, 4096, 0)
BLOCKS = 256, 512, 1024
REPEATS = 5


@functools.partial(jax.jit, static_argnames=("with_lengths", "block"))
def attend(queries, keys, values, start, with_lengths, block):
    """Attention of consecutive queries from position ``start`` on, in launches of ``block`` queries."""
    slots, outputs = keys.shape[1], []
    for first in range(0, queries.shape[1], block):
        positions = start + first + jnp.arange(min(block, queries.shape[1]))
        lengths = jnp.minimum(positions[-1:] + 1, slots) if with_lengths else None
        outputs.append(
            jax.nn.dot_product_attention(
                queries[:, first : first + block],
                keys,
                values,
                mask=(positions[:, None] >= jnp.arange(slots))[None, None],
                key_value_seq_lengths=lengths,
                implementation="cudnn",
            )
        )
    return jnp.concatenate(outputs, axis=1)


def main() -> None:
    for tokens, slots, start in CASES:
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (1, tokens, HEADS, HEAD_DIM), *[(1, slots, KV_HEADS, HEAD_DIM)] * 2
        heads = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
        ways = {"mask": (False, tokens), "lengths": (True, tokens)}
        ways |= {f"lengths, blocks of {block}": (True, block) for block in BLOCKS if block < tokens}
        expected, parts = None, []
        for name, (with_lengths, block) in ways.items():
            run = functools.partial(attend, *heads, jnp.int32(start), with_lengths=with_lengths, block=block)
            outputs = np.asarray(run())
            expected = outputs if expected is None else expected
            durations = timing.profile(run, REPEATS)
            total = sum(map(sum, durations.values())) / REPEATS
            cudnn = sum(sum(times) for kernel, times in durations.items() if "sdpa" in kernel) / REPEATS
            parts.append(f"{name}: {total:.0f} ({cudnn:.0f}), {(outputs != expected).sum()} differ")
        print(f"{tokens}x{slots} from {start}: " + "; ".join(parts), flush=True)


if __name__ == "__main__":
    main()
