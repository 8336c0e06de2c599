"""A whole model through a baseline, one decoder layer at a time, each seeing the errors of those before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32
from safetensors.numpy import save_file

from checkpoints_tools.baselines import groups
from checkpoints_tools.baselines.awq import awq
from checkpoints_tools.baselines.gptq import gptq
from checkpoints_tools.source.layer import dense_layer, read_layer
from grinqh_jax.hf import HFCheckpoint, params
from grinqh_jax.model.apply import HEAD, Dense, of_head
from grinqh_jax.model.decoder import DecoderLayer, linear_shapes

METHODS = ("rtn", "gptq", "awq")
UNQUANTIZED_BITS = 16


class _Moments(Dense):
    """An ``apply`` strategy that collects ``E[x x^T]`` and ``E|x|`` of every layer's inputs."""

    def __init__(self):
        self.seen = {}

    def product(self, name: str, linear, x):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        hessian = jnp.matmul(rows.T, rows, precision="highest") / len(rows)
        self.seen[name.rpartition(".")[2]] = hessian, jnp.mean(jnp.abs(rows), axis=0)
        return super().product(name, linear, x)


@jax.jit
def _run(layer: DecoderLayer, x: Float[jax.Array, "1 t d"]):
    moments = _Moments()
    return layer("layer", x, jnp.arange(x.shape[1])[None], moments)[0], moments.seen


def quantize_layer(
    kernels: dict[str, np.ndarray],
    moments: dict[str, tuple[jax.Array, jax.Array]],
    method: str,
    bits: int,
    **options,
) -> dict[str, np.ndarray]:
    """Dequantized float32 kernels of one layer.

    Args:
      kernels: by part, ``[in, out]``.
      moments: by part, ``E[x x^T]`` and ``E|x|`` of its inputs; not looked at by rtn.
      method: one of ``METHODS``.
      bits: of the integers.
      options: of ``gptq``.
    """
    result = {}
    for part, kernel in kernels.items():
        w = jnp.asarray(kernel, jnp.float32)
        if method == "gptq":
            w = gptq(w, moments[part][0], bits, **options)
        elif method == "awq":
            w = awq(w, *moments[part], bits)
        else:
            w = groups.rtn(w, bits)
        result[part] = np.asarray(w)
    return result


def write(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    out: Path,
    *,
    method: str,
    bits: int,
    done: Callable[[str], None] = lambda part: None,
    **options,
) -> None:
    """Writes a Hugging Face checkpoint with float32 kernels that hold the dequantized integers.

    The output projection and the embedding stay as they are, as is usual for these methods. The weights
    of the result are held in host memory.

    Args:
      source: the checkpoint.
      windows: calibration tokens.
      out: directory to make; must not exist.
      method, bits, options: see ``quantize_layer``.
      done: called with each layer's name.

    Raises:
      FileExistsError: ``out`` exists.
      CheckpointError: see ``HFCheckpoint.read``.
    """
    out.mkdir(parents=True)
    tensors = {}

    def keep(key: str, value: np.ndarray) -> None:
        rows = value.T if params.is_kernel(key) else value
        parts = params.sources(source.config)[key]
        ends = np.cumsum([part.shape[0] for part in parts])[:-1]
        for part, piece in zip(parts, np.split(rows, ends), strict=True):
            tensors[part.name] = np.ascontiguousarray(piece)

    embedding = source.read("embed.embedding")
    hidden = embedding[windows].astype(np.float32)
    for i in range(source.config.num_layers):
        kernels, norms = read_layer(source, i)
        moments = {}
        if method != "rtn":
            moments = mean_moments(dense_layer(source, kernels, norms, jnp.float32), hidden)
        kernels = quantize_layer(kernels, moments, method, bits, **options)
        if method != "rtn":
            layer = dense_layer(source, kernels, norms, jnp.float32)
            for window in hidden:
                window[...] = _run(layer, window[None])[0][0]
        for part, kernel in kernels.items():
            keep(f"layers.{i}.{part}.kernel", kernel)
        for part, scale in norms.items():
            keep(f"layers.{i}.{part}.scale", scale)
        done(f"layers.{i}")
    keep("embed.embedding", embedding)
    keep("norm.scale", source.read("norm.scale"))
    if not source.config.tie_word_embeddings:
        keep(f"{HEAD}.kernel", source.read(f"{HEAD}.kernel"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(source.hf_config, indent=2))
    for file in source.companions:
        shutil.copy(file, out)


def mean_moments(layer: DecoderLayer, hidden: np.ndarray) -> dict[str, tuple[jax.Array, jax.Array]]:
    """``(E[x x^T] [k, k], E[|x|] [k])`` of the inputs of each part of a dense layer, from ``[s, t, d]``."""
    total = None
    for window in hidden:
        seen = _run(layer, window[None])[1]
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
    return jax.tree.map(lambda value: value / len(hidden), total)


def mean_bits_read(source: HFCheckpoint, bits: int) -> tuple[float, float]:
    """Bits read per weight: of the quantized layers, and over all linear layers, a 16-bit head included."""
    sizes = {name: k * n for name, (k, n) in linear_shapes(source.config).items()}
    quantized = sum(size for name, size in sizes.items() if not of_head(name))
    everything = sum(sizes.values())
    total = quantized * groups.bits_read(bits) + (everything - quantized) * UNQUANTIZED_BITS
    return groups.bits_read(bits), total / everything
