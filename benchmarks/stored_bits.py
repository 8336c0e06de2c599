"""Prints the bits per weight that checkpoints store in each version of the format, as a Markdown table.

    python benchmarks/stored_bits.py Qwen3-0.6B Llama-3.2-1B grinqh_jax/bundled/qwen3-7m DIRECTORY

The bits follow from the shapes: codes, scales, level gains and padding of all linear layers.
"""

import argparse

from checkpoints_tools.convert.sizes import bits_per_weight_stored
from grinqh_jax.benchmarking import random_model
from grinqh_jax.checkpoint.quantization import READABLE_VERSIONS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME_OR_DIR", help="published shape, or directory")
    parser.add_argument("--max-bits", type=int, nargs="+", default=[8, 4], help="bits of the codes")
    args = parser.parse_args()
    columns = [(bits, version) for bits in args.max_bits for version in READABLE_VERSIONS]
    heads = [f"`--max-bits {bits}`, version {version}" for bits, version in columns]
    print("| model | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for model in args.models:
        config = random_model.shape(model)
        stored = [f"{bits_per_weight_stored(config, bits, version):.3f}" for bits, version in columns]
        print(f"| {random_model.label(model)} | " + " | ".join(stored) + " |")


if __name__ == "__main__":
    main()
