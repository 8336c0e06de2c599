"""Tiny models of gpt-oss whose experts are in MXFP4, made without the package's own reader."""

import hf_directories
import ml_dtypes
import numpy as np
from family_cases import CASES

CONFIG = CASES["gpt_oss"] | {"intermediate_size": 96, "num_hidden_layers": 2}
QUANTIZED = CONFIG | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NUMBERS += [-number for number in NUMBERS]


def random_packed(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns random blocks ``[*shape, 16]`` and scales ``[*shape]``; the numbers are about 1."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(120, 126, shape).astype(np.uint8)


def one_by_one(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers of blocks, computed in a loop, float64."""
    rows = []
    for block, scale in zip(blocks.reshape(-1, 16), scales.reshape(-1), strict=True):
        codes = [code for byte in block.tolist() for code in (byte % 16, byte // 16)]
        rows.append([NUMBERS[code] * 2.0 ** (int(scale) - 127) for code in codes])
    return np.array(rows).reshape(*scales.shape[:-1], -1)


def packed_state() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the weights of a checkpoint in MXFP4, and the same weights in bfloat16."""
    plain = hf_directories.random_state(CONFIG)
    packed = dict(plain)
    for i, name in enumerate(sorted(plain)):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = packed.pop(name).shape
            blocks, scales = random_packed((experts, outputs, inputs // 32), seed=i)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers = one_by_one(blocks, scales).swapaxes(1, 2)
            plain[name] = np.ascontiguousarray(numbers).astype(ml_dtypes.bfloat16)
    return packed, plain
