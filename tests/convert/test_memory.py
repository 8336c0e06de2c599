"""A checkpoint of a billion parameters converts within 3 GB of memory."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_models

from grinqh_jax.hf import params
from grinqh_jax.model.config import ModelConfig

BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
LIMIT_BYTES = 3e9
_CHUNK = 1 << 22


def write_random_weights(path: Path, hf_config: dict) -> int:
    """Streams a safetensors file of bfloat16 weights, a few MiB at a time; returns the parameters.

    The format is 8 bytes with the header's length, a JSON header, the tensors one after another.
    """
    tensors = [part for parts in params.sources(ModelConfig.from_hf(hf_config)).values() for part in parts]
    header, end = {}, 0
    for tensor in tensors:
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            size = math.prod(tensor.shape)
            for start in range(0, size, _CHUNK):
                values = rng.standard_normal(min(_CHUNK, size - start), np.float32)
                values = 1 + 0.1 * values if len(tensor.shape) == 1 else values * tensor.shape[1] ** -0.5
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    return end // 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_billion_parameters_convert_within_3_gb(tmp_path):
    model = tiny_models.write(tmp_path / "model", shards=0)
    (model / "config.json").write_text(json.dumps(BILLION))
    assert write_random_weights(model / "model.safetensors", BILLION) > 1e9
    calib = tmp_path / "calib.txt"
    calib.write_text(tiny_models.TEXT * 20)
    command = [sys.executable, "-m", "checkpoints_tools.convert", "--model", model, "--out", tmp_path / "out"]
    command += ["--calib", calib, "--tokens", os.environ.get("GRINQH_TEST_TOKENS", "2048")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    print(output)
    peak = float(re.search(r"peak memory ([\d,]+) MiB", output)[1].replace(",", "")) * 2**20
    assert peak < LIMIT_BYTES
