"""GRINQH-JAX as a library: load a model, turn the dial, see what was really read.

    python examples/turn_the_dial.py [--model DIR] [--prompt TEXT] [--bits 2 3 4 8]

Prints the same prompt continued at each setting, then the realised bits of every linear layer. Only the
first setting compiles anything: the dial is an array.
"""

import argparse
import time

import grinqh_jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--prompt", default="The old house stood at the end of the road")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    generator = grinqh_jax.Generator.load(args.model or grinqh_jax.BUNDLED_MODEL)
    statistics = {}
    for bits in args.bits:
        start = time.perf_counter()
        request = grinqh_jax.Request(bits=bits, max_tokens=args.max_tokens, temperature=0)
        generation = generator.generate(args.prompt, request)
        print(f"--- --bits {bits:g}")
        for text in generation:
            print(text, end="", flush=True)
        statistics[bits] = generation.statistics()
        seconds = time.perf_counter() - start
        print(f"\n({seconds:.1f} s, {statistics[bits].realised_bits:.2f} bits realised)\n")

    print("realised bits".ljust(20) + "".join(f"{bits:>8g}" for bits in statistics))
    for layer in next(iter(statistics.values())).realised_bits_per_layer:
        row = (s.realised_bits_per_layer[layer] for s in statistics.values())
        print(layer.ljust(20) + "".join(f"{bits:8.2f}" for bits in row))


if __name__ == "__main__":
    main()
