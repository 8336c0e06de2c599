"""Reads weights of the exchange form with numpy and safetensors, without this library.

    python -m checkpoints_tools.export --model DIR --out exported
    python examples/read_weights.py exported [--layer layers.0.down]

The script restores a linear layer at each level, and prints how far the level is from the highest one.
Formulas and the order of the digits are those of docs/format.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

GROUP, TILE, PIECE = 128, 512, 64


def read(directory: Path, leaf: str) -> np.ndarray:
    """Returns a tensor."""
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(directory / files[leaf], framework="numpy") as file:
        return file.get_tensor(leaf)


def digits(planes: np.ndarray) -> np.ndarray:
    """Returns the digits ``[P, K, N]`` of planes ``[P, K, N / 16]``."""
    outputs = np.arange(16 * planes.shape[-1])
    tile, m = divmod(outputs, TILE)
    pieces = np.minimum(TILE, len(outputs) - TILE * tile) // PIECE
    chunk, rest = np.divmod(m, 16 * pieces)
    lane, inner = divmod(rest, 4)
    piece, column = divmod(lane, 4)
    word = 32 * tile + 4 * piece + 2 * (chunk // 2) + column // 2
    digit = 4 * (2 * (column % 2) + inner % 2) + 2 * (chunk % 2) + inner // 2
    return planes[..., word] >> (2 * digit).astype(np.uint32) & 3


def weights(directory: Path, layer: str, level: int) -> np.ndarray:
    """Returns the float32 weights ``[K, N]`` of a linear layer at a level, padding included."""
    planes, scales, gains = (read(directory, f"{layer}.{leaf}") for leaf in ("planes", "scales", "gains"))
    value = np.full((), 0.5 * 4.0 ** (1 - level) - 2, np.float32)
    for f, plane in enumerate(digits(planes[:level])):
        value = value + plane.astype(np.float32) * np.float32(4.0**-f)
    return gains[level - 1] * np.repeat(scales.astype(np.float32), GROUP, axis=0) * value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="what checkpoints_tools.export has written")
    parser.add_argument("--layer", default="layers.0.down", help="linear layer (default: %(default)s)")
    args = parser.parse_args()
    levels = len(read(args.directory, f"{args.layer}.planes"))
    best = weights(args.directory, args.layer, levels)
    print(f"{args.layer}: {best.shape[0]} inputs and {best.shape[1]} outputs, with padding")
    for level in range(1, levels + 1):
        error = np.linalg.norm(weights(args.directory, args.layer, level) - best) / np.linalg.norm(best)
        print(f"level {level}, {2 * level} bits: relative error {error:.4f}")


if __name__ == "__main__":
    main()
