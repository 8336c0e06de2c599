"""Measures how closely answers read the bits that were asked for, and the quality that the dial costs.

    python benchmarks/short_answers.py --model DIR --data ../shared/data --output benchmarks/results/FILE.json
    python benchmarks/short_answers.py --prompts 2 --tokens 20 --windows 2     a quick check, without files

``answers``: the model answers short chat prompts and, with ``--data``, word problems and excerpts of books
and documentation. A row has the difference between the mean bits that the first n tokens read and the bits
asked for: its mean over the answers, its mean magnitude, 90th percentile and maximum.

``rules`` (with ``--data``): the model reads windows of a text token by token, graded, after a prompt at full
precision. One of three rules sets the bits: ``fixed`` keeps the setting that the prompt gave, ``chunk``
corrects it by the excess after every 16 tokens and has no debt, and ``token`` is ``Dial.follow``. A row has
the mean bits read, the mean KL divergence from full precision, and ``over_chunk``: this divergence divided by
that of ``chunk`` at equal mean bits (the logarithm is interpolated between settings).
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import random

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.dial import Dial, layer_shares
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.texts import Received, Texts
from grinqh_jax.evaluation.tasks import read_problems
from grinqh_jax.model.cache import KVCache

CHAT = (
    "Hi",
    "Hello, how are you?",
    "Tell me a story.",
    "Once upon a time",
    "Who was Lincoln?",
    "What is 12*7?",
    "Yes",
    "Why?",
    "The old house",
    "Write a poem about the sea.",
    "User: Hello\nAssistant:",
    "User: What is a ship?\nAssistant:",
    "There are 7 tables",
    "Explain gravity.",
    "My name is Anna. What is my name?",
    "Good morning!",
    "List three colours.",
    "Who are you?",
    "Dear Sir,",
    "Chapter I",
    "In 1865",
    "He said",
    "User: Tell me about the war of 1812.\nAssistant:",
    "A",
)
EXCERPT_CHARACTERS = (60, 150, 400, 1000)
PROMPT_TOKENS = 32
CHUNK = 16


def prompts(generator: Generator, data: pathlib.Path | None, count: int) -> dict[str, list[list[int]]]:
    """Returns ``count`` prompts of each kind."""
    rng, texts = random.Random(0), {"chat": list(CHAT[:count])}
    if data is not None:
        texts["problems"] = [one.prompt for one in read_problems(data / "arithmetic_test.jsonl", count)]
        for kind in ("books", "docs"):
            text, texts[kind] = (data / f"{kind}_test.txt").read_text(), []
            for _ in range(count):
                start = rng.randrange(len(text) - max(EXCERPT_CHARACTERS))
                excerpt = text[start : start + rng.choice(EXCERPT_CHARACTERS)]
                texts[kind].append(excerpt[excerpt.find(" ") + 1 :])
    return {kind: [generator.tokenizer.encode(text) for text in some] for kind, some in texts.items()}


def answer_bits(generator: Generator, some: list[list[int]], bits: float, temperature: float, tokens: int):
    """Answers each prompt; returns the mean bits that each token read, ``[prompts, tokens]``."""
    limit = tokens + 1  # The first token is chosen at full precision.
    received = [Received() for _ in some]
    jobs = []
    for row, (prompt, one) in enumerate(zip(some, received, strict=True)):
        sampling = Sampling.on_host(1, temperature=temperature, seed=row)
        jobs.append(Job(prompt, Settings.of_request(sampling, bits, (), limit), one))
    capacity = max(map(len, some)) + limit
    dial = generator.dial(bits)
    Texts(generator.model, dial, jobs[0].settings, capacity=capacity, slots=len(jobs)).run(jobs)
    shares = layer_shares(generator.model.config)
    return np.stack([np.concatenate([stats.bits for stats in one.stats]) @ shares for one in received])


def answers(generator: Generator, args: argparse.Namespace) -> list[dict]:
    rows = []
    for kind, some in prompts(generator, args.data, args.prompts).items():
        for temperature in args.temperatures:
            for bits in args.bits:
                read = answer_bits(generator, some, bits, temperature, args.tokens)
                row = {"prompts": kind, "temperature": temperature, "bits": bits}
                for n in (3, 5, 10, 20, 50, 100, 200):
                    if n <= args.tokens:
                        difference = read[:, :n].mean(axis=1) - bits
                        magnitude = np.abs(difference)
                        figures = (
                            difference.mean(),
                            magnitude.mean(),
                            np.quantile(magnitude, 0.9),
                            magnitude.max(),
                        )
                        row[f"first_{n}"] = dict(
                            zip(
                                ("mean", "magnitude", "p90", "largest"),
                                np.round(figures, 3).tolist(),
                                strict=True,
                            )
                        )
                rows.append(row)
                print(row, flush=True)
    return rows


@functools.partial(jax.jit, static_argnames="rule")
def read_by_rule(model, dial: Dial, cache: KVCache, tokens, log_reference, rule: str):
    """Reads tokens ``[steps, B]`` graded; returns KL divergence and mean bits of each, ``[steps, B]``."""
    rows = tokens.shape[1]

    def read_token(carry, step):
        dial, cache = carry
        token, log_reference = step
        positions = cache.lengths
        logits, cache, stats = engine.decode_step(model, token, cache, dial.thresholds.by_name())
        if rule == "token":
            dial = dial.follow(stats.bits, jnp.ones(rows, bool), positions)
        difference = log_reference - jax.nn.log_softmax(logits)
        return (dial, cache), (jnp.sum(jnp.exp(log_reference) * difference, axis=-1), stats.bits)

    def read_chunk(carry, steps):
        (dial, cache), (kl, bits) = jax.lax.scan(read_token, carry, steps)
        if rule == "chunk":
            dial = dial.observe(bits.swapaxes(0, 1), jnp.full(rows, CHUNK))
        return (dial, cache), (kl, bits @ dial.shares)

    chunks = jax.tree.map(lambda a: a.reshape(-1, CHUNK, *a.shape[1:]), (tokens, log_reference))
    _, result = jax.lax.scan(read_chunk, (dial, cache), chunks)
    return jax.tree.map(lambda a: a.reshape(-1, rows), result)


def rules(generator: Generator, args: argparse.Namespace) -> list[dict]:
    model, rows = generator.model, []
    length, shape = PROMPT_TOKENS + args.window, (args.windows, PROMPT_TOKENS + args.window)
    for kind in ("books", "docs"):
        text = (args.data / f"{kind}_test.txt").read_text()[: 8 * length * args.windows]
        tokens = jnp.array(generator.tokenizer.encode(text)[: length * args.windows], jnp.int32).reshape(
            shape
        )
        logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
        steps = tokens[:, PROMPT_TOKENS:].T, jax.nn.log_softmax(logits)[:, PROMPT_TOKENS:].swapaxes(0, 1)
        by_chunk: dict[float, float] = {}  # mean bits read -> log of the divergence
        for rule in ("chunk", "fixed", "token"):
            for bits in args.rule_bits:
                dial = Dial.create(model, generator.targets, [bits] * args.windows)
                cache = KVCache.create(model.config, args.windows, length, model.compute_dtype)
                prompt, lengths = tokens[:, :PROMPT_TOKENS], jnp.full(args.windows, PROMPT_TOKENS)
                _, cache, preview = engine.prefill_with_preview(
                    model, prompt, lengths, cache, dial.thresholds
                )
                dial = dial.observe(preview.bits, preview.counts)
                kl, read = map(np.asarray, read_by_rule(model, dial, cache, *steps, rule))
                row = {"text": kind, "rule": rule, "bits": bits}
                row |= {"read": round(float(read.mean()), 4), "kl": round(float(kl.mean()), 5)}
                row["deviation_of_windows"] = round(float(read.mean(axis=0).std()), 4)
                if rule == "chunk":
                    by_chunk[float(read.mean())] = float(np.log(kl.mean()))
                elif min(by_chunk) <= read.mean() <= max(by_chunk):
                    expected = np.exp(np.interp(read.mean(), list(by_chunk), list(by_chunk.values())))
                    row["over_chunk"] = round(float(kl.mean() / expected), 4)
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=[str(BUNDLED_MODEL)],
        metavar="DIR",
        help="GRINQH checkpoints (default: the bundled one)",
    )
    add(
        "--data",
        type=pathlib.Path,
        metavar="DIR",
        help="directory with books_test.txt, docs_test.txt and arithmetic_test.jsonl",
    )
    add(
        "--bits",
        nargs="+",
        type=float,
        default=[2, 2.5, 3, 4],
        metavar="B",
        help="bits to ask for (default: 2 2.5 3 4)",
    )
    add("--temperatures", nargs="+", type=float, default=[0, 0.8], metavar="T", help="(default: 0 0.8)")
    add("--tokens", type=int, default=200, metavar="N", help="length of an answer (default: 200)")
    add("--prompts", type=int, default=24, metavar="N", help="prompts of each kind, at most 24 (default: 24)")
    add(
        "--rule-bits",
        nargs="+",
        type=float,
        default=[1.75, 2, 2.25, 2.5, 3, 3.25],
        metavar="B",
        help="settings at which rules are compared (default: 1.75 2 2.25 2.5 3 3.25)",
    )
    add("--window", type=int, default=224, metavar="N", help="graded tokens of a window (default: 224)")
    add("--windows", type=int, default=16, metavar="N", help="windows of each text (default: 16)")
    add("--output", type=pathlib.Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    if args.window % CHUNK:
        parser.error(f"--window {args.window}: give a multiple of {CHUNK}")
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": {},
    }
    for directory in args.model:
        generator = Generator.load(directory)
        result = {"answers": answers(generator, args)}
        if args.data is not None:
            result["rules"] = rules(generator, args)
        report["models"][pathlib.Path(os.path.realpath(directory)).name] = result
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
