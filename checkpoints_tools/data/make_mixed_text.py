"""Writes the generated kinds of the calibration text ``mixed``: arithmetic and source code.

    python checkpoints_tools/data/make_mixed_text.py

The other kinds in ``mixed`` were written by hand (see the README there).
"""

import argparse
import json
import random
import sys
from pathlib import Path

from checkpoints_tools.data.make_calibration_text import records

OUTPUT = Path(__file__).with_name("mixed")
ROOT = Path(__file__).parents[2]
SOURCES = (
    "pallas_kernels/layout.py",
    "grinqh_jax/model/rope.py",
    "grinqh_jax/decoding/stop.py",
    "grinqh_jax/text/stream.py",
    "grinqh_jax/json_files.py",
    "checkpoints_tools/source/array_cache.py",
)
SOURCE_CHARACTERS = 3000
"""Length of the excerpt of a source file."""

NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Esi", "Farid", "Grete", "Hiro", "Ines", "Jomo", "Kira", "Luis")
THINGS = ("apples", "stamps", "bricks", "pages", "candles", "tickets", "chairs", "pears", "maps", "coins")


def boxes(rng: random.Random) -> str:
    """Returns a worked problem of one product, one sum and one difference."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, count, each, given = rng.randint(5, 90), rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 20)
    product = count * each
    return (
        f"Question: {name} has {start} {thing} and buys {count} boxes of {each} more. Then {given} are given "
        f"away. How many are left?\nAnswer: {count}*{each}={product} {thing} are in the boxes. "
        f"{start}+{product}={start + product}. {start + product}-{given}={start + product - given}.\n"
        f"#### {start + product - given}"
    )


def journey(rng: random.Random) -> str:
    """Returns a worked problem of speeds and times."""
    speed, hours, faster = rng.randrange(40, 100, 5), rng.randint(2, 6), rng.randrange(5, 30, 5)
    rest = rng.randint(1, 3)
    total = speed * hours + (speed + faster) * rest
    return (
        f"Question: A bus drives {hours} hours at {speed} km/h and then {rest} hours at {speed + faster} "
        f"km/h. How far does it drive?\nAnswer: In the first part it drives {hours} * {speed} = "
        f"{speed * hours} km, in the second {rest} * {speed + faster} = {(speed + faster) * rest} km. "
        f"Together that is {speed * hours} + {(speed + faster) * rest} = {total} km.\n#### {total}"
    )


def price(rng: random.Random) -> str:
    """Returns a worked problem of a percentage."""
    name, thing = rng.choice(NAMES), rng.choice(("coat", "lamp", "bicycle", "table", "radio"))
    full, share = rng.randrange(40, 400, 20), rng.choice((10, 15, 20, 25, 30, 40))
    off = full * share / 100
    return (
        f"Question: A {thing} costs ${full}. {name} gets a discount of {share}%. What does {name} pay?\n"
        f"Answer: {share}% of {full} is {full} * {share / 100:g} = {off:g}. So {name} pays "
        f"{full} - {off:g} = {full - off:g} dollars.\n#### {full - off:g}"
    )


def columns(rng: random.Random) -> str:
    """Returns sums, differences and products of larger numbers."""
    lines = []
    for _ in range(8):
        a, b = rng.randint(100, 9999), rng.randint(10, 999)
        lines.append(
            rng.choice(
                (f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} x {b % 90 + 10} = {a * (b % 90 + 10)}")
            )
        )
    return "\n".join(lines)


def arithmetic(rng: random.Random) -> list[str]:
    """Returns documents of worked problems, plain calculations, and records."""
    makers = (boxes, journey, price)
    documents = ["\n\n".join(rng.choice(makers)(rng) for _ in range(4)) for _ in range(16)]
    documents += [columns(rng) for _ in range(6)] + [records(rng) for _ in range(6)]
    rng.shuffle(documents)
    return documents


def write(kind: str, texts: list[str]) -> None:
    """Writes the documents of a kind."""
    path = OUTPUT / f"{kind}.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes, {len(lines)} documents")


def main() -> int:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write("arithmetic", arithmetic(random.Random(args.seed)))
    write("source_code", [(ROOT / name).read_text(encoding="utf-8")[:SOURCE_CHARACTERS] for name in SOURCES])
    return 0


if __name__ == "__main__":
    sys.exit(main())
