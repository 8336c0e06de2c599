"""Makes a draft model for a Hugging Face checkpoint: its first layers, trained to predict as it does.

    python benchmarks/draft_model.py --model qwen3-7m --out qwen3-7m-draft --layers 2 --seconds 120
    grinqh-jax generate --model qwen3-7m-grinqh --speculate qwen3-7m-draft "..."

The draft model has the embeddings, the tokenizer and the output projection of the model. Its layers and its
last norm are trained with AdamW on windows of a text to minimize the divergence of its next-token
distributions from those of the model. ``OUT/training.json`` records the divergence on held-out windows before
and after. The draft model can draft for every model of the same vocabulary.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file

from checkpoints_tools.calibration.text import BUNDLED_TEXT
from grinqh_jax.hf import load_decoder, open_checkpoint, params
from grinqh_jax.model.decoder import Decoder, checkpoint_leaves
from grinqh_jax.text.tokenizer import Tokenizer

TRAINED = "layers", "norm"
"""Parts of the draft model that are trained."""

BATCH, WINDOW, HELD_OUT = 8, 128, 16
"""Windows of a step, tokens of a window, and number of windows, spread over the text, that are held out."""

RATE, WARM_UP = 1e-3, 20


def write_shallow(model: pathlib.Path, out: pathlib.Path, layers: int) -> None:
    """Writes a checkpoint of the first layers of a model."""
    out.mkdir(parents=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    config = json.loads((model / "config.json").read_text())
    if not 0 < layers < config["num_hidden_layers"]:
        raise SystemExit(f"--layers {layers}: {model} has {config['num_hidden_layers']} layers; keep fewer")
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dropped = tuple(f"model.layers.{i}." for i in range(layers, 1000))
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    save_file(kept, out / "model.safetensors", {"format": "pt"})


def windows(
    tokenizer: Tokenizer, path: pathlib.Path
) -> tuple[Int[np.ndarray, "s t"], Int[np.ndarray, "h t"]]:
    """Returns the windows of a text to train on, and those that are held out."""
    tokens = np.array(tokenizer.encode(path.read_text(encoding="utf-8")), np.int32)
    rows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    held_out = np.linspace(0, len(rows) - 1, HELD_OUT).astype(int)
    return np.delete(rows, held_out, axis=0), rows[held_out]


def divergence(target: Decoder, draft: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, ""]:
    """Returns the mean divergence of the draft's next-token distributions from the target's, in nats."""
    of_target = jax.nn.log_softmax(jax.lax.stop_gradient(target(tokens)))
    of_draft = jax.nn.log_softmax(draft(tokens))
    return jnp.mean(jnp.sum(jnp.exp(of_target) * (of_target - of_draft), axis=-1))


def train(target: Decoder, draft: Decoder, rows: np.ndarray, seconds: float, most: int) -> int:
    """Trains the draft model for a time, at most ``most`` steps; returns the number of steps."""
    rest = nnx.split(target)
    graph, trained, fixed = nnx.split(draft, lambda path, _: path[0] in TRAINED, ...)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0, RATE, WARM_UP)))

    @jax.jit(donate_argnums=(0, 1))
    def step(trained, state, rest, fixed, tokens):
        def loss(trained):
            return divergence(nnx.merge(*rest), nnx.merge(graph, trained, fixed), tokens)

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = adam.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, rng = adam.init(trained), np.random.default_rng(0)
    start, steps = time.monotonic(), 0
    while steps < most and time.monotonic() - start < seconds:
        tokens = jnp.asarray(rows[rng.integers(len(rows), size=BATCH)])
        trained, state, value = step(trained, state, rest, fixed, tokens)
        steps += 1
        if steps % 50 == 0:
            print(f"{steps} steps, {time.monotonic() - start:.0f} s: divergence {value:.3f}", flush=True)
    nnx.update(draft, trained)
    return steps


def save(draft: Decoder, out: pathlib.Path) -> None:
    """Replaces the trained tensors of a checkpoint."""
    file = out / "model.safetensors"
    tensors = load_file(file)
    for key, value in checkpoint_leaves(draft).items():
        if key.split(".")[0] in TRAINED:
            for name, tensor in params.to_tensors(draft.config, key, np.asarray(value)).items():
                tensors[name] = np.ascontiguousarray(tensor.astype(tensors[name].dtype))
    save_file(tensors, file, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=pathlib.Path, metavar="DIR", help="Hugging Face checkpoint, one file")
    add("--out", required=True, type=pathlib.Path, metavar="DIR", help="directory to write")
    add("--layers", type=int, default=2, metavar="N", help="layers of the draft model (default: 2)")
    add("--text", type=pathlib.Path, default=BUNDLED_TEXT, metavar="FILE", help="(default: the bundled text)")
    add("--seconds", type=float, default=120, metavar="S", help="time of the training (default: 120)")
    add("--steps", type=int, default=3000, metavar="N", help="most steps (default: 3000)")
    args = parser.parse_args()
    write_shallow(args.model, args.out, args.layers)
    target, draft = (load_decoder(open_checkpoint(d), jnp.float32) for d in (args.model, args.out))
    rows, held_out = windows(Tokenizer.load(args.model), args.text)
    measured = nnx.jit(divergence)
    before = float(measured(target, draft, jnp.asarray(held_out)))
    steps = train(target, draft, rows, args.seconds, args.steps)
    after = float(measured(target, draft, jnp.asarray(held_out)))
    save(draft, args.out)
    figures = {"command": " ".join(["python", *sys.argv]), "steps": steps, "before": before, "after": after}
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"divergence on held-out windows: {before:.3f} before, {after:.3f} after {steps} steps")


if __name__ == "__main__":
    main()
