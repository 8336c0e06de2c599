"""Compares reading all channels at one level with grading: perplexity and divergence from full precision.

    python benchmarks/levels.py --data books_test.txt

``reading.batch_level`` chooses the level of large batches by these figures. Any device will do.
"""

import argparse
import pathlib

import jax
import numpy as np

from grinqh_jax import BUNDLED_MODEL, Generator
from grinqh_jax.evaluation import perplexity
from grinqh_jax.model import apply
from grinqh_jax.model.flat_model import FlatModel
from pallas_kernels.layout import DIGIT_BITS


def at_level(model: FlatModel, tokens: np.ndarray, length: int, level: int) -> dict[str, float]:
    """Returns the figures of windows whose channels are all read at one level."""

    @jax.jit
    def logits(model, window):
        return model.module(window, apply.AtLevel(level))

    columns: list[np.ndarray] = []
    for start in range(0, len(tokens) - 1, length):
        window = tokens[None, start : start + length]
        reference = jax.jit(lambda model, window: model.module(window))(model, window)
        compared = perplexity.compare(logits(model, window), reference, window)
        columns.append(np.stack([compared.loss, compared.kl, compared.same_top1])[:, 0])
    loss, kl, same = np.concatenate(columns, axis=1).mean(axis=1)
    return {"perplexity": float(np.exp(loss)), "kl": float(kl), "same_top1": float(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=BUNDLED_MODEL, metavar="DIR", help="default: the bundled model")
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="FILE", help="text")
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="first N tokens (default: 4096)"
    )
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 5, 6], metavar="B")
    args = parser.parse_args()
    generator = Generator.load(args.model)
    model, length = generator.model, args.sequence_length
    tokens = perplexity.read_tokens(generator, args.data, args.tokens)
    line = "{:16} perplexity {perplexity:.3f}, KL {kl:.5f}, same top token {same_top1:.4f}"
    for level in range(1, model.full_bits // DIGIT_BITS + 1):
        figures = at_level(FlatModel(model), tokens, length, level)
        print(line.format(f"level {level}, {DIGIT_BITS * level} bits", **figures), flush=True)
    for result in perplexity.measure(model, generator.targets, tokens, args.bits, sequence_length=length):
        figures = {name: float(getattr(result, name)) for name in ("perplexity", "kl", "same_top1")}
        print(line.format(f"graded, {result.realised_bits:.2f} bits", **figures), flush=True)


if __name__ == "__main__":
    main()
