"""Writes a Hugging Face checkpoint of any shape with random weights, at the speed of the disk."""

import itertools
import json
import math
import pathlib
import shutil

import ml_dtypes
import numpy as np

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.hf import params
from grinqh_jax.hf.survey import INDEX
from grinqh_jax.model.config import ModelConfig

SHARD_BYTES = 4e9

BLOCK, CHUNK = 1 << 24, 1 << 22
"""Sizes of a block of random numbers and of the chunks that tensors consist of. Each chunk starts at a random
offset in the block, so few random numbers make all weights."""


def write(directory: pathlib.Path, hf_config: dict) -> None:
    """Writes bfloat16 weights in shards, their index, the bundled model's tokenizer and, last, the config.

    The standard deviation of the weights keeps the size of activations through the layers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_hf(hf_config)
    # Without duplicates: a tied output projection is the embedding.
    tensors = list(dict.fromkeys(itertools.chain(*params.sources(config).values())))
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(BLOCK, np.float32)
    deviations = {tensor: _deviation(tensor, config) for tensor in tensors}
    blocks = {size: (size * numbers).astype(ml_dtypes.bfloat16) for size in set(deviations.values())}
    shards: dict[int, dict[params.Source, np.ndarray]] = {}
    for tensor, end in zip(tensors, itertools.accumulate(map(_bytes, tensors)), strict=True):
        shards.setdefault(int(end // SHARD_BYTES), {})[tensor] = blocks[deviations[tensor]]
    files = {}
    for i, shard in enumerate(shards.values(), 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard, rng)
        files |= {tensor.name: name for tensor in shard}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL / name, directory / name)
    (directory / "config.json").write_text(json.dumps(hf_config))


def _deviation(tensor: params.Source, config: ModelConfig) -> float:
    if len(tensor.shape) == 1:
        return 0.1  # biases are this noise, norm scales 1 plus it
    embedding = "embed" in tensor.name and not config.tie_word_embeddings
    return 1.0 if embedding else tensor.shape[1] ** -0.5


def _bytes(tensor: params.Source) -> int:
    return 2 * math.prod(tensor.shape)


def _write_shard(
    path: pathlib.Path, blocks: dict[params.Source, np.ndarray], rng: np.random.Generator
) -> None:
    """Writes a safetensors file: the header's length in 8 bytes, a JSON header, then the tensors."""
    header, end = {}, 0
    for tensor in blocks:
        start, end = end, end + _bytes(tensor)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor, block in blocks.items():
            size = math.prod(tensor.shape)
            for start in range(0, size, CHUNK):
                offset = rng.integers(BLOCK - CHUNK)
                values = block[offset : offset + min(CHUNK, size - start)]
                if len(tensor.shape) == 1 and not tensor.name.endswith("bias"):
                    values = (values.astype(np.float32) + 1).astype(values.dtype)
                file.write(values.view(np.uint8))
