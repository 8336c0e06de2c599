"""A Markdown table of quality against bits, as in the README: perplexity at several settings of the dial.

    python examples/quality_against_bits.py --data FILE.txt [--model DIR] [--reference HF_DIR] [--tokens N]

``--reference`` is the unquantized checkpoint to compare with; without it the model at full precision
(all 8 bits) is the reference. Every token is graded as in decoding.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import grinqh_jax
from grinqh_jax import hf
from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.evaluation.result import with_error

COLUMNS = ("--bits", "bits read", "perplexity", "of full precision", "KL divergence (nats)", "same top token")


def main() -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text that the model was not calibrated on")
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--reference", type=Path, help="unquantized Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--bits", type=flags.bits, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0, "full"])
    return cli.run(table, parser, None)


def table(args: argparse.Namespace) -> int:
    generator = grinqh_jax.Generator.load(args.model or grinqh_jax.BUNDLED_MODEL)
    tokens = np.array(generator.tokenizer.encode(args.data.read_text(encoding="utf-8"))[: args.tokens])
    reference = None
    if args.reference:
        reference = hf.load_decoder(hf.open_checkpoint(args.reference), jnp.float32)
    rows = measure(generator.model, generator.targets, tokens, args.bits, reference=reference)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print(
            f"| {row.bits} | {row.realised_bits:.2f} | {with_error(row.perplexity, row.stderr, '.2f')} "
            f"| {row.ratio:.3f} | {row.kl:.4f} | {row.same_top1:.1%} |"
        )

    return 0


if __name__ == "__main__":
    sys.exit(main())
