"""Checkpoints of gpt-oss whose experts are in MXFP4."""

import json

import hf_directories
import ml_dtypes
import numpy as np
import pytest
from mxfp4_models import CONFIG, NUMBERS, QUANTIZED, packed_state, random_packed

from grinqh_jax.cli import inspect
from grinqh_jax.errors import CheckpointError, UnsupportedModelError
from grinqh_jax.hf import mxfp4, open_checkpoint


def test_every_code_and_the_largest_and_smallest_scales():
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    blocks = np.tile(codes[::2] | codes[1::2] << 4, (3, 1))
    numbers = mxfp4.dequantize(blocks, np.array([0, 127, 254], np.uint8)).reshape(3, 32).astype(np.float64)
    expected = np.tile(NUMBERS, 2)
    np.testing.assert_array_equal(numbers[0], expected * 2.0**-127)
    np.testing.assert_array_equal(numbers[1], expected)
    small = np.abs(expected) < 2
    np.testing.assert_array_equal(numbers[2, small], 2.0**127 * expected[small])
    assert np.isinf(numbers[2, ~small]).all()
    assert np.isnan(mxfp4.dequantize(blocks[:1], np.array([255], np.uint8)).astype(np.float32)).all()


def test_numbers_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_packed((3, 10, 4))
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
    ours = mxfp4.dequantize(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(ours.swapaxes(1, 2), theirs)


@pytest.mark.parametrize("shards", [0, 3])
def test_a_checkpoint_equals_one_in_bfloat16(shards, tmp_path):
    packed, plain = packed_state()
    ours = open_checkpoint(hf_directories.write(tmp_path / "packed", QUANTIZED, packed, shards))
    expected = open_checkpoint(hf_directories.write(tmp_path / "plain", CONFIG, plain))
    assert "quantization_config" not in ours.hf_config
    assert ours.parameters == expected.parameters
    for key in ours.parameters:
        np.testing.assert_array_equal(ours.read(key), expected.read(key), err_msg=key)
    rows = slice(2, 4)
    key = "layers.1.experts_gate_up.kernel"
    np.testing.assert_array_equal(ours.read(key, rows), expected.read(key)[rows])


def test_inspect_shows_a_checkpoint(tmp_path, capsys):
    hf_directories.write(tmp_path, QUANTIZED, packed_state()[0])
    assert inspect.main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "gpt_oss"
    assert {
        "sinks of attention",
        "biases of routers",
        "SwiGLU clamped at 1.25, with alpha 2.5",
        "biases of qkv, o, experts_gate_up, experts_down",
        "a window of 8 tokens in 1 of 2 layers",
    } <= set(report["options"])
    assert report["computed_by_xla"] == []
    assert "U8" in report["stored"]["dtypes"]


NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{NAME}_scales"), f"tensor {NAME}_scales is missing"),
        (
            lambda state: state.update({f"{NAME}_scales": state[f"{NAME}_scales"][:, :, :2].copy()}),
            rf"tensor {NAME}_scales has shape \[6, 64, 2\], {NAME}_blocks asks for \[6, 64, 3\]",
        ),
        (
            lambda state: state.update({NAME: np.ones((6, 96, 64), ml_dtypes.bfloat16)}),
            rf"{NAME}_blocks are the same parameter|{NAME} are the same parameter",
        ),
        (
            lambda state: state.update({f"{NAME}_bias": np.ones((6, 64), np.uint8)}),
            f"tensor {NAME}_bias has dtype U8",
        ),
    ],
    ids=["no scales", "other scales", "both", "dtype"],
)
def test_damaged_checkpoints_are_refused_by_name(change, message, tmp_path):
    state = packed_state()[0]
    change(state)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf_directories.write(tmp_path, QUANTIZED, state))


def test_other_families_and_methods_are_refused(tmp_path):
    for config, method in ((hf_directories.QWEN3, "mxfp4"), (CONFIG, "fp8")):
        changed = config | {"quantization_config": {"quant_method": method}}
        with pytest.raises(UnsupportedModelError, match=f"already quantized by {method}"):
            open_checkpoint(hf_directories.write(tmp_path, changed, {"a": np.ones(1, np.float32)}))
