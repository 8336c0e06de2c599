"""Writes ``calibration.txt``, the converter's default calibration text.

    python checkpoints_tools/data/make_calibration_text.py --model ../shared/models/qwen3-32m

Most of it is sampled from a small language model of this project after a few words: fluent English in several
styles, without a copyright. The rest is text that prose lacks: worked arithmetic and records from a random
generator, and source code of this project.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from grinqh_jax.decoding.engine import decode_chunk, prefill
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder

OUTPUT = Path(__file__).with_name("calibration.txt")
ROOT = Path(__file__).parents[2]
SOURCES = ("pallas_kernels/layout.py", "pallas_kernels/codes.py", "grinqh_jax/model/config.py")
TOKENS = 512
ROUNDS = 6
"""Number of continuations of each opening."""
OPENINGS = (
    "The old house stood at the end of the lane,",
    '"You are late," said the captain, and',
    "It was in the spring of that year that my father",
    "She opened the letter slowly, for",
    "Of all the animals that live in the northern woods,",
    "The ship had been at sea for nine days when",
    "I have often been asked why I never",
    "On the morning of the trial the streets",
    "To make a good bread, take",
    "The mountains of that country are",
    "My dear sister,",
    "There is no doubt that the mind of a child",
    "Congress passed the act in order to",
    "After the war, farmers in the South",
    "The railroad changed the lives of workers because",
    "By the end of the century, immigrants from",
    "Women who worked in the factories",
    "# Using templates with the standard library\n\n",
    "This function returns a pointer to",
    "The following table lists the compiler options that",
    "## Abstract\n\nThis PEP proposes",
)


def generated_texts(decoder: Decoder, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Samples one continuation of every opening, with top-p 0.95."""
    prompts = [tokenizer.encode(opening).ids for opening in OPENINGS]
    lengths = jnp.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), int(lengths.max())), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    batch = len(prompts)
    cache = KVCache.create(decoder.config, batch, padded.shape[1] + TOKENS, jnp.float32)
    logits, cache = prefill(decoder, jnp.asarray(padded), lengths, cache)
    sampling = Sampling.create(batch, temperature=1.0, top_p=0.95, seed=seed)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    end = jnp.array([tokenizer.token_to_id("<|endoftext|>")])
    chunk, _ = decode_chunk(
        decoder, first, first == end, cache, None, sampling, end, jnp.full(batch, TOKENS), steps=TOKENS
    )
    texts = []
    for i in range(batch):
        tokens = [int(first[i]), *np.asarray(chunk.tokens[i, : chunk.counts[i]]).tolist()]
        texts.append(tokenizer.decode(prompts[i] + tokens).strip())
    return texts


def arithmetic(rng: random.Random) -> str:
    """Returns a worked word problem with random names and numbers."""
    name = rng.choice(("Ada", "Ben", "Carla", "Dmitri", "Esi", "Farid", "Grete", "Hiro"))
    thing = rng.choice(("apples", "stamps", "bricks", "pages", "candles", "tickets"))
    start, boxes, each, given = rng.randint(5, 90), rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 20)
    total = start + boxes * each
    return (
        f"Question: {name} has {start} {thing} and buys {boxes} boxes of {each} more. Then {given} are given "
        f"away. How many are left?\nAnswer: {boxes}*{each}={boxes * each} {thing} are in the boxes. "
        f"{start}+{boxes * each}={total}. {total}-{given}={total - given}.\n#### {total - given}"
    )


def records(rng: random.Random) -> str:
    """Returns a list of JSON objects and a table of the same numbers."""
    rows = [
        {
            "id": rng.randint(1000, 9999),
            "mass_kg": round(rng.lognormvariate(1, 1), 2),
            "ok": rng.random() < 0.8,
        }
        for _ in range(6)
    ]
    table = "\n".join(
        f"| {row['id']} | {row['mass_kg']:.2f} | {'yes' if row['ok'] else 'no'} |" for row in rows
    )
    return f"{json.dumps(rows, indent=2)}\n\n| id | mass (kg) | ok |\n|---|---|---|\n{table}"


def main() -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint that writes the prose")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    tokenizer = Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json"))
    rng = random.Random(args.seed)
    decoder, documents = load_decoder(checkpoint, jnp.float32), []
    for i in range(ROUNDS):
        documents += generated_texts(decoder, tokenizer, args.seed + i)
    documents += ["\n\n".join(arithmetic(rng) for _ in range(8)) for _ in range(4 * ROUNDS)]
    documents += [records(rng) for _ in range(2 * ROUNDS)]
    documents += [(ROOT / source).read_text(encoding="utf-8")[:4000] for source in SOURCES]
    rng.shuffle(documents)
    OUTPUT.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes, {len(documents)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
