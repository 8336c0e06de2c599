"""Makes a trained mixture of experts: upcycles a dense Qwen3 checkpoint and trains it on texts.

    python benchmarks/mixture.py --model DENSE --text a.txt b.txt --held-out c.txt --out DIR --seconds 300

Cuts each MLP into slices of channels and makes several experts of each slice, with random routers. Then
trains all weights with AdamW and a load-balancing loss, and writes a Qwen3-MoE checkpoint that the converter
reads. ``DIR/training.json`` records the losses of both models on the held-out texts, the usage of the
experts, and how similar their weights are.

A run stops after ``--seconds``. The same command resumes it, and writes the checkpoint after the last step.
The state is in ``DIR.training.npz``.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Int32
from mixture_model import Losses, Parameters, Upcycling, hf_config, losses, tensors, upcycled
from safetensors.numpy import save_file

from grinqh_jax.hf import HFCheckpoint, load_decoder, open_checkpoint
from grinqh_jax.model.apply import Dense
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.text.documents import read_documents
from grinqh_jax.text.tokenizer import Tokenizer

BALANCE = 0.02
"""Weight of the load-balancing loss."""

CAPACITY = 1.5
"""Rows that an expert takes in training, as a multiple of the mean."""

WARM_UP = 20
"""Number of steps in which the learning rate rises."""

GRADIENT_NORM = 1.0
"""Largest norm of a gradient; larger ones are scaled down."""

HELD_OUT_WINDOWS = 16
"""Number of windows of each held-out text."""


def read_windows(
    paths: list[pathlib.Path], tokenizer: Tokenizer, length: int, most: int | None = None
) -> Int32[np.ndarray, "s t"]:
    """Returns windows of ``length`` token ids, at most ``most`` of each text, spread evenly over it."""
    sets = []
    for path in paths:
        ids = [token for document in read_documents(path) for token in tokenizer.encode(document)]
        rows = np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
        if not len(rows):
            raise SystemExit(f"{path}: {len(ids)} tokens are fewer than a window of {length}")
        chosen = (
            slice(None) if most is None else np.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=int)
        )
        sets.append(rows[chosen])
    return np.concatenate(sets)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a linear rise and a cosine fall of the learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(WARM_UP, steps // 2), steps, rate / 20)
    return optax.chain(
        optax.clip_by_global_norm(GRADIENT_NORM), optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    )


def make_step(config: ModelConfig, adam: optax.GradientTransformation, dtype) -> Callable[..., Any]:
    """Returns the jitted function of a training step."""

    def loss(parameters: Parameters, tokens) -> tuple[jax.Array, Losses]:
        means = losses(parameters, tokens, config, capacity=CAPACITY, dtype=dtype)
        return means.cross_entropy + BALANCE * means.imbalance, means

    @jax.jit(donate_argnums=(0, 1))
    def step(parameters, state, tokens):
        gradients, means = jax.grad(loss, has_aux=True)(parameters, tokens)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, means

    return step


def save_state(path: pathlib.Path, step: int, tree: Any) -> None:
    """Writes the leaves of a tree and the number of steps."""
    writing = path.with_name(path.name + ".writing")
    with writing.open("wb") as file:
        np.savez(file, step, *map(np.asarray, jax.tree.leaves(tree)))
    writing.rename(path)


def load_state(path: pathlib.Path, like: Any) -> tuple[int, Any]:
    """Returns what ``save_state`` wrote."""
    with np.load(path) as file:
        step, *leaves = (file[f"arr_{i}"] for i in range(len(file.files)))
    return int(step), jax.tree.unflatten(jax.tree.structure(like), map(jnp.asarray, leaves))


@jax.jit
def _cross_entropy(model: Decoder, tokens) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = model.hidden(tokens, positions, Dense())
    logits = model.logits(hidden, Dense()).astype(jnp.float32)[:, :-1]
    of_next = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_next)


def held_out_losses(checkpoint: HFCheckpoint, texts: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the loss of each text by the product's decoder, in nats per token."""
    model = load_decoder(checkpoint, jnp.float32)
    return {
        name: round(float(np.mean([_cross_entropy(model, window[None]) for window in windows])), 4)
        for name, windows in texts.items()
    }


def similarity(kernels: jax.Array) -> dict[str, float]:
    """Returns the mean and the largest cosine between the weights of two experts, over all layers."""
    flat = np.asarray(kernels).reshape(*kernels.shape[:2], -1)
    flat = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    cosines = flat @ flat.swapaxes(1, 2)
    others = cosines[:, ~np.eye(flat.shape[1], dtype=bool)]
    return {"mean": round(float(others.mean()), 4), "largest": round(float(others.max()), 4)}


def write(directory: pathlib.Path, config: dict, parameters: Parameters, dense: HFCheckpoint) -> None:
    """Writes the checkpoint in bfloat16, with the tokenizer of the dense one."""
    directory.mkdir(parents=True, exist_ok=True)
    named = tensors(parameters, ModelConfig.from_hf(config), ml_dtypes.bfloat16)
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    for path in dense.companions:
        shutil.copyfile(path, directory / path.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="dense Qwen3 checkpoint, tied embeddings")
    add("--text", type=pathlib.Path, nargs="+", required=True, metavar="FILE", help="texts to train on")
    add("--held-out", type=pathlib.Path, nargs="+", required=True, metavar="FILE", help="texts to judge by")
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="checkpoint to write")
    add("--experts", type=int, default=16, metavar="E", help="experts of a layer (default: 16)")
    add("--chosen", type=int, default=4, metavar="C", help="experts that a token reads (default: 4)")
    add("--noise", type=float, default=0.1, help="noise of new experts, relative (default: 0.1)")
    add("--steps", type=int, default=500, help="training steps (default: 500)")
    add("--batch", type=int, default=8, help="windows of a step (default: 8)")
    add("--length", type=int, default=256, help="tokens of a window (default: 256)")
    add("--rate", type=float, default=5e-4, help="learning rate (default: 0.0005)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of products (default: float32)")
    add("--seconds", type=float, default=float("inf"), help="stop after this time (default: never)")
    add("--seed", type=int, default=0, help="of routers, noise and windows (default: 0)")
    args = parser.parse_args()

    start = time.monotonic()
    dense, upcycling = open_checkpoint(args.model), Upcycling(args.experts, args.chosen, args.noise)
    try:
        moe = hf_config(dense.hf_config, upcycling)
    except ValueError as error:
        parser.error(str(error))
    config, tokenizer = ModelConfig.from_hf(moe), Tokenizer.load(dense.directory)
    windows = read_windows(args.text, tokenizer, args.length)
    texts = {
        path.stem: read_windows([path], tokenizer, args.length, HELD_OUT_WINDOWS) for path in args.held_out
    }
    adam = optimizer(args.rate, args.steps)
    parameters = upcycled(dense, upcycling, np.random.default_rng(args.seed))
    state, first = adam.init(parameters), 0
    saved = args.out.with_name(args.out.name + ".training.npz")
    if saved.exists():
        first, (parameters, state) = load_state(saved, (parameters, state))
    train = make_step(config, adam, jnp.dtype(args.dtype))
    for step in range(first, args.steps):
        rng = np.random.default_rng([args.seed, step])
        batch = windows[rng.choice(len(windows), args.batch, replace=len(windows) < args.batch)]
        parameters, state, means = train(parameters, state, batch)
        if step % 10 == 0 or step == args.steps - 1:
            print(
                f"step {step}: loss {means.cross_entropy:.3f}, imbalance {means.imbalance:.3f}, usage"
                f" {means.usage.min():.3f} to {means.usage.max():.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if time.monotonic() - start > args.seconds and step < args.steps - 1:
            save_state(saved, step + 1, (parameters, state))
            print(f"stopped after {step + 1} of {args.steps} steps: run the same command to resume")
            return 0

    write(args.out, moe, parameters, dense)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens_trained_on": args.steps * args.batch * args.length,
        "loss_dense": held_out_losses(dense, texts),
        "loss_mixture": held_out_losses(open_checkpoint(args.out), texts),
        "usage": np.round(np.asarray(means.usage), 4).tolist(),
        "cosine_of_experts": {
            name: similarity(parameters[f"{name}.kernel"]) for name in ("experts_gate_up", "experts_down")
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("loss_dense", "loss_mixture", "cosine_of_experts")}))
    saved.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
