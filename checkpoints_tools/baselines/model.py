"""Quantizes a model with RTN, GPTQ or AWQ, layer by layer."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from safetensors.numpy import save_file

from checkpoints_tools.baselines import groups
from checkpoints_tools.baselines.awq import awq
from checkpoints_tools.baselines.gptq import gptq
from checkpoints_tools.source.layer import dense_layer, each_expert, embed, read_layer
from grinqh_jax.companions import companion_path
from grinqh_jax.errors import UnsupportedModelError
from grinqh_jax.hf import HFCheckpoint, params
from grinqh_jax.hf.stored_together import as_stored
from grinqh_jax.model.apply import HEAD, Dense, in_head
from grinqh_jax.model.decoder_layer import DecoderLayer
from grinqh_jax.model.parameters import EMBEDDING
from grinqh_jax.model.weight_counts import weights_read

METHODS = ("rtn", "gptq", "awq")

UNQUANTIZED_BITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A baseline and its options.

    Attributes:
      method: One of ``METHODS``.
      bits: Bits of the integers.
      act_order: GPTQ only: round the channels with the largest energy first.
      damping: GPTQ only: share of the mean diagonal that is added to the Hessian.
    """

    method: str
    bits: int
    act_order: bool = False
    damping: float = 0.01


class Moments(NamedTuple):
    """Moments of the inputs of a projection.

    Attributes:
      hessian: ``E[x x^T]``.
      magnitude: ``E[|x|]``.
    """

    hessian: Float[Array, "k k"]
    magnitude: Float[Array, "k"]


class _MomentsOfInputs(Dense):
    """An apply strategy that runs every layer at full precision and collects the moments of its inputs."""

    def __init__(self):
        self.moments: dict[str, Moments] = {}

    def product(self, name: str, linear, x):
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        hessian = jnp.matmul(rows.T, rows, precision="highest") / len(rows)
        self.moments[name.rpartition(".")[2]] = Moments(hessian, jnp.mean(jnp.abs(rows), axis=0))
        return super().product(name, linear, x)


@jax.jit
def _run(layer: DecoderLayer, x: Float[jax.Array, "1 t d"]):
    apply = _MomentsOfInputs()
    return layer("layer", x, jnp.arange(x.shape[1])[None], apply)[0], apply.moments


def quantize(
    source: HFCheckpoint,
    windows: Int32[np.ndarray, "s t"],
    out: Path,
    options: Options,
    on_progress: Callable[[str], None] = lambda note: None,
) -> None:
    """Quantizes a checkpoint and writes the dequantized weights as a Hugging Face checkpoint.

    The kernels of the result are float32. The output projection and the embedding stay as they are, as is
    usual for these methods. Host memory holds the whole result.

    Args:
      source: Checkpoint.
      windows: Calibration tokens.
      out: Directory to make; must not exist.
      options: Baseline and its options.
      on_progress: Called with a note after each layer.

    Raises:
      FileExistsError: ``out`` exists.
      UnsupportedModelError: The model is a mixture of experts, which only RTN supports.
      CheckpointError: See ``HFCheckpoint.read``.
    """
    if source.config.num_experts and options.method != "rtn":
        raise UnsupportedModelError(
            f"{options.method} does not support mixtures of experts ({source.config.num_experts} experts); "
            "use rtn"
        )
    out.mkdir(parents=True)
    tensors = {}

    def add(key: str, value: np.ndarray) -> None:
        tensors.update(as_stored(source.config, params.to_tensors(source.config, key, value)))

    hidden = embed(source, windows, np.float32)
    for i in range(source.config.num_layers):
        kernels, vectors = read_layer(source, i)
        moments = {}
        if options.method != "rtn":
            moments = mean_moments(dense_layer(source, i, kernels, vectors, jnp.float32), hidden)
        quantized = quantize_layer(kernels, moments, options)
        if options.method != "rtn":
            layer = dense_layer(source, i, dict(quantized), vectors, jnp.float32)
            for window in hidden:
                window[...] = _run(layer, window[None])[0][0]
        for projection, kernel in quantized.items():
            add(f"layers.{i}.{projection}.kernel", kernel)
        for name, vector in vectors.items():
            add(f"layers.{i}.{name}", vector)
        on_progress(f"layers.{i}")
    whole = [EMBEDDING, f"{source.config.final_norm.name}.scale"]
    whole += [] if source.config.tie_word_embeddings else [f"{HEAD}.kernel"]
    for key in whole:
        add(key, source.read(key))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(source.hf_config, indent=2))
    for file in source.companions:
        shutil.copy(file, companion_path(file, out))


def quantize_layer(
    kernels: Mapping[str, np.ndarray | Array], moments: Mapping[str, Moments], options: Options
) -> dict[str, np.ndarray]:
    """Returns the dequantized float32 kernels of one layer.

    Args:
      kernels: Kernels ``[in, out]``, or ``[experts, in, out]``, by projection.
      moments: Moments of the inputs, by projection; RTN needs none.
      options: Baseline and its options.
    """
    result = {}
    for projection, kernel in kernels.items():
        if kernel.ndim == 3:
            experts = [groups.rtn(jnp.asarray(w, jnp.float32), options.bits) for w in each_expert(kernel)]
            result[projection] = np.stack(experts)
            continue
        w = jnp.asarray(kernel, jnp.float32)
        if options.method == "gptq":
            w = gptq(
                w,
                moments[projection].hessian,
                options.bits,
                act_order=options.act_order,
                damping=options.damping,
            )
        elif options.method == "awq":
            w = awq(w, *moments[projection], options.bits)
        else:
            w = groups.rtn(w, options.bits)
        result[projection] = np.asarray(w)
    return result


def mean_moments(layer: DecoderLayer, hidden: Float[np.ndarray, "s t d"]) -> dict[str, Moments]:
    """Returns the moments of the inputs of each projection of a dense layer.

    Args:
      layer: Decoder layer.
      hidden: Hidden states before the layer.
    """
    total = None
    for window in hidden:
        moments = _run(layer, window[None])[1]
        total = moments if total is None else jax.tree.map(jnp.add, total, moments)
    return jax.tree.map(lambda value: value / len(hidden), total)


def mean_bits_read(source: HFCheckpoint, bits: int) -> tuple[float, float]:
    """Returns the bits read per weight.

    Args:
      source: Checkpoint.
      bits: Bits of the integers.

    Returns:
      ``(layers, everything)``: the mean over the quantized layers, and over all linear layers with a 16-bit
      output projection.
    """
    sizes = weights_read(source.config)
    quantized = sum(size for name, size in sizes.items() if not in_head(name))
    everything = sum(sizes.values())
    total = quantized * groups.bits_read(bits) + (everything - quantized) * UNQUANTIZED_BITS
    return groups.bits_read(bits), total / everything
