"""Samples the calibration text ``self``, saves its tokens, and prints what may make it a bad one.

    python benchmarks/self_text.py --model DIR_OR_GGUF --tokens 32768 --output FILE.npz

For each window: the mean loss of the unquantized model in float32, and how much larger the largest input of
a ``down`` projection is at its worst token than at the median token, over all layers. Tokens that begin a
window do not count, as in a conversion. FILE.npz holds the windows; FILE.txt holds the text; FILE.json the
figures. ``--tokens-from FILE.npz`` measures windows that were sampled elsewhere.
"""

import argparse
import json
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration.self_text import sampled_windows
from checkpoints_tools.calibration.statistics import first_scored_position
from checkpoints_tools.calibration.text import MAX_WINDOW
from checkpoints_tools.convert import compilation
from checkpoints_tools.source.open import open_source
from grinqh_jax.hf import load_decoder
from grinqh_jax.model.apply import Dense
from grinqh_jax.text.tokenizer import Tokenizer


class LargestInputs(Dense):
    """Keeps the largest input of the ``down`` projection of each layer, for each token."""

    def __init__(self):
        self.largest: list[Float[Array, "b t"]] = []

    def product(self, name: str, linear, x: Float[Array, "*rows k"]) -> Float[Array, "*rows n"]:
        if name.endswith(".down"):
            self.largest.append(jnp.max(jnp.abs(x), axis=-1))
        return super().product(name, linear, x)


@jax.jit
def measure(decoder, window):
    """Returns the loss of each predicted token, and the largest inputs ``[layers, t]``."""
    apply = LargestInputs()
    logits = jax.nn.log_softmax(decoder(window[None], apply)[0])
    losses = -jnp.take_along_axis(logits[:-1], window[1:, None], axis=-1)[:, 0]
    return losses, jnp.stack(apply.largest)[:, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_GGUF", help="unquantized model")
    add("--tokens", type=int, default=32768, metavar="N", help="tokens to sample (default: 32768)")
    add("--tokens-from", type=pathlib.Path, metavar="FILE", help=".npz file of windows to measure instead")
    add("--output", type=pathlib.Path, required=True, metavar="FILE.npz", help="file for the windows")
    args = parser.parse_args()

    compilation.prepare()
    source = open_source(args.model)
    tokenizer = Tokenizer.load(source.directory)
    length = min(MAX_WINDOW, source.config.max_position_embeddings)
    if args.tokens_from:
        windows = np.load(args.tokens_from)["windows"]
    else:
        windows = sampled_windows(source, tokenizer, args.tokens, length)
        np.savez_compressed(args.output, windows=windows.astype(np.int32))
    text = "\n=====\n".join(tokenizer.decode(window.tolist()) for window in windows)
    args.output.with_suffix(".txt").write_text(text)
    decoder = load_decoder(source, jnp.float32)
    first = first_scored_position(windows.shape[1])
    rows = []
    for window in windows:
        losses, largest = map(np.asarray, measure(decoder, jnp.asarray(window)))
        ratios = largest[:, first:] / np.median(largest[:, first:], axis=1, keepdims=True)
        layer, position = np.unravel_index(ratios.argmax(), ratios.shape)
        rows.append(
            {
                "loss": round(float(losses.mean()), 4),
                "largest_ratio": round(float(ratios.max()), 1),
                "layer": int(layer),
                "position": int(position) + first,
                "token": tokenizer.decode([int(window[position + first])]),
                "tokens_above_20": int((ratios.max(axis=0) > 20).sum()),
            }
        )
        print(rows[-1], flush=True)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "distinct_tokens": int(np.unique(windows).size),
        "windows": rows,
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
