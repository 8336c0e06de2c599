"""Times streamed decoding as a user sees it: decode chunks read on the host, with the dial.

    python benchmarks/streaming.py --shape Qwen3-8B --chunks 32 64
    python benchmarks/streaming.py --temperatures 0 0.6 --top-k 20 --top-p 0.95      greedy and sampled

Each row has the tokens per second over the whole text, and over all chunks but the first, which loads the
kernels.
"""

import argparse
import dataclasses
import itertools
import time

import jax
import report as reports
from report import say

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.programs import Programs
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.texts import Received, Texts

PROMPT_TOKENS = 64


def stream(model, steps: int, temperature: float, args: argparse.Namespace) -> dict:
    """Generates one text in decode chunks of ``steps`` tokens; returns a result row."""
    sampling = Sampling.on_host(1, temperature=temperature, top_k=args.top_k, top_p=args.top_p)
    settings = Settings.of_request(sampling, args.bits, stop_tokens=(), limit=args.tokens + 1)
    texts = Texts(
        model,
        Dial.create(model, random_model.TARGETS, [args.bits]),
        settings,
        capacity=PROMPT_TOKENS + args.tokens + 1,
        policy=dataclasses.replace(DecodePolicy.for_device(), chunk_steps=steps),
    )
    text, counts, ends = Received(), [], []
    Programs().compile(lowerings(texts.device, [PROMPT_TOKENS], settings, [(settings.greedy, False)]))
    texts.add(Job([1] * PROMPT_TOKENS, settings, text))
    while text.reason is None:
        before = len(text.tokens)
        texts.advance()
        if len(text.tokens) > before:
            counts.append(len(text.tokens) - before)
            ends.append(time.perf_counter())
    texts.close()
    counts = counts[1:]  # the first token comes with the prompt
    return {
        "chunk": steps,
        "temperature": temperature,
        "tokens_per_second": round(sum(counts) / (ends[-1] - ends[0]), 1),
        "after_the_first_chunk": round(sum(counts[1:]) / (ends[-1] - ends[1]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--shape",
        default="Qwen3-8B",
        metavar="NAME_OR_DIR",
        help="published shape, or directory of a model (default: Qwen3-8B)",
    )
    add("--bits", type=float, default=3.0, metavar="B", help="setting of the dial (default: 3)")
    add(
        "--chunks",
        nargs="+",
        type=int,
        default=[32, 64],
        metavar="N",
        help="tokens per decode chunk (default: 32 64)",
    )
    add("--tokens", type=int, default=384, metavar="N", help="tokens to generate (default: 384)")
    add(
        "--temperatures",
        nargs="+",
        type=float,
        default=[0.0],
        metavar="T",
        help="sampling temperatures; 0 is greedy (default: 0)",
    )
    add("--top-k", type=int, default=0, metavar="K", help="0 means all tokens (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="probability mass (default: 1)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    shape = random_model.label(args.shape)
    report = reports.Report(args, shape=shape, bits=args.bits, top_k=args.top_k, top_p=args.top_p, rows=[])
    say(f"{report.fields['device']}, jax {jax.__version__}, {shape}, {args.bits} bits")
    model = jax.block_until_ready(random_model.graded(random_model.shape(args.shape)))
    for steps, temperature in itertools.product(args.chunks, args.temperatures):
        if report.out_of_time(f"chunks of {steps}, temperature {temperature}"):
            continue
        row = stream(model, steps, temperature, args)
        report.fields["rows"].append(row)
        say(str(row))
        report.save()
    report.finish()


if __name__ == "__main__":
    main()
