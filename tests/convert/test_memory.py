"""Memory of a conversion: a checkpoint of a billion parameters, and a layer of a large mixture of experts."""

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
from grinqh_jax.hf.stored_together import stored_forms
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
MIXTURE = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 8192,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 44,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}
"""A layer of gpt-oss-120b with 44 of its 128 experts: as many as are in memory in two groups."""

_CHUNK = 1 << 22


def stored_tensors(hf_config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each tensor; those of experts are in MXFP4 if the configuration says so."""
    config = ModelConfig.from_hf(hf_config)
    tensors = {part.name: ("BF16", part.shape) for parts in params.sources(config).values() for part in parts}
    for name, form in stored_forms(config).items():
        if form.scales is not None:
            bytes_of = {name: ("U8", form.shape), form.scales: ("U8", form.shape[:-1])}
        elif name.endswith("_bias"):
            bytes_of = {name: ("BF16", form.shape)}
        else:
            continue
        tensors = {key: tensor for key, tensor in tensors.items() if key not in form.parts} | bytes_of
    return tensors


def write_random_weights(path: Path, hf_config: dict) -> int:
    """Streams a safetensors file of random weights, a few MiB at a time; returns its bytes.

    The format is 8 bytes with the header's length, a JSON header, the tensors one after another.
    """
    header, end = {}, 0
    tensors = stored_tensors(hf_config)
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * (1 if dtype == "U8" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape)
            for start in range(0, size, _CHUNK):
                count = min(_CHUNK, size - start)
                if dtype == "U8":
                    limits = (118, 123) if name.endswith("_scales") else (0, 256)  # scales of 2**-9 to 2**-5
                    values = rng.integers(*limits, count, np.uint8)
                else:
                    values = rng.standard_normal(count, np.float32)
                    values = 1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5
                    values = values.astype(ml_dtypes.bfloat16)
                file.write(values.tobytes())
    return end


def peak_of_conversion(directory: Path, hf_config: dict, tokens: str, *more: str) -> float:
    """Returns the largest resident size, in bytes, of a conversion of random weights on a CPU."""
    model = tiny_models.write(directory / "model", shards=0)
    (model / "config.json").write_text(json.dumps(hf_config))
    write_random_weights(model / "model.safetensors", hf_config)
    calib = directory / "calib.txt"
    calib.write_text(tiny_models.TEXT * 20)
    command = [sys.executable, "-m", "checkpoints_tools.convert", "--model", model]
    command += ["--out", directory / "out", "--calib", calib, "--tokens", tokens, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    print(output)
    return float(re.search(r"peak memory ([\d,]+) MiB", output)[1].replace(",", "")) * 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_billion_parameters_convert_within_3_gb(tmp_path):
    tokens = os.environ.get("GRINQH_TEST_TOKENS", "2048")
    assert peak_of_conversion(tmp_path, BILLION, tokens) < 3e9
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 2e9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_layer_of_gpt_oss_120b_converts_within_6_5_gb(tmp_path):
    """The other 84 experts add two copies of the codes of their first projection while they are written.

    The basis is the original one, because a rotation of all experts takes most of the time of a conversion. A
    rotation would add an expert in float64, twice.
    """
    weights = MIXTURE["hidden_size"] * 2 * MIXTURE["intermediate_size"]
    peak = peak_of_conversion(tmp_path, MIXTURE, "1024", "--basis", "original")
    assert peak + 84 * 2 * weights + 2 * 8 * weights < 6.5e9
