"""Decoding as a user gets it: chunk by chunk, through the host, with the dial, at several chunk sizes.

    python benchmarks/streaming.py --shape Qwen3-8B --chunks 16 64

Prints each size's tokens per second over the whole text, and over all but the first chunk, which loads the
kernels. What ``benchmarks/decode.py`` times is one dispatch by itself.
"""

import argparse
import time

import jax
import numpy as np

from grinqh_jax import random_model
from grinqh_jax.decoding import Decoding
from grinqh_jax.dial import Dial
from grinqh_jax.sampling import Sampling

PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=random_model.shapes())
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 64], help="tokens of a chunk")
    parser.add_argument("--tokens", type=int, default=384)
    args = parser.parse_args()
    model = jax.block_until_ready(random_model.graded(random_model.shape(args.shape)))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.shape}, {args.bits} bits", flush=True
    )
    for steps in args.chunks:
        decoding = Decoding(
            model,
            [[1] * PROMPT_TOKENS],
            max_tokens=args.tokens + 1,
            max_context=PROMPT_TOKENS + args.tokens + 1,
            dial=Dial(model, random_model.TARGETS, np.full(1, args.bits)),
            sampling=Sampling.create(1),
            chunk_steps=steps,
        )
        decoding.compile_prefill()
        decoding.prefill()
        decoding.compile_decode()
        counts, ends = [], [time.perf_counter()]
        for chunk in decoding.chunks():
            counts.append(len(chunk.tokens[0]))
            ends.append(time.perf_counter())
        whole = sum(counts) / (ends[-1] - ends[0])
        later = sum(counts[1:]) / (ends[-1] - ends[1])
        print(f"chunks of {steps}: {whole:.1f} tokens/s, after the first {later:.1f}", flush=True)


if __name__ == "__main__":
    main()
