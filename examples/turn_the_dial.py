"""Loads a model, turns the dial, and shows how many bits each linear layer read.

    python examples/turn_the_dial.py [--model DIR] [--prompt TEXT] [--bits 2 3 4 8]

The script continues one prompt at each setting of the dial, then prints the realised bits of every linear
layer. Only the first setting compiles: the dial is an array, and other values run the same program.
"""

import argparse
import time

import grinqh_jax


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=grinqh_jax.BUNDLED_MODEL,
        metavar="DIR_OR_HUB_ID",
        help="GRINQH checkpoint (default: the bundled qwen3-7m)",
    )
    parser.add_argument(
        "--prompt",
        default="The old house stood at the end of the road",
        metavar="TEXT",
        help="text to continue (default: %(default)s)",
    )
    parser.add_argument(
        "--bits",
        type=float,
        nargs="+",
        default=[2, 3, 4, 8],
        metavar="B",
        help="settings of the dial, mean bits read per weight (default: 2 3 4 8)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=48,
        metavar="N",
        help="tokens to generate at each setting (default: 48)",
    )
    args = parser.parse_args()

    generator = grinqh_jax.Generator.load(args.model)
    statistics = {}
    for bits in args.bits:
        start = time.perf_counter()
        request = grinqh_jax.Request(bits=bits, max_tokens=args.max_tokens, temperature=0)
        generation = generator.generate(args.prompt, request)
        print(f"--- {bits:g} bits: {args.prompt}", end="", flush=True)
        for text in generation:
            print(text, end="", flush=True)
        statistics[bits] = generation.statistics()
        seconds = time.perf_counter() - start
        print(f"\n({seconds:.1f} s, {statistics[bits].realised_bits:.2f} bits realised)\n")

    print("realised bits".ljust(20) + "".join(f"{bits:>8g}" for bits in statistics))
    for layer in next(iter(statistics.values())).realised_bits_per_layer:
        row = (one.realised_bits_per_layer[layer] for one in statistics.values())
        print(layer.ljust(20) + "".join(f"{bits:8.2f}" for bits in row))


if __name__ == "__main__":
    main()
