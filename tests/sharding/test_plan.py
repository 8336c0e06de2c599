"""The plan of a model's memory: bytes of the parts, and the verb."""

import json

import pytest
from family_cases import CASES
from random_models import CONFIGS

from grinqh_jax.benchmarking import random_model
from grinqh_jax.cli import plan
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.sharding.memory import device_memory


def test_a_plan_says_what_fits(capsys):
    assert plan.main(["Qwen3-8B", "--memory", "6G", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    eight_bits = {row["devices"]: row for row in rows if row["weights_stored"] == "8 bits"}
    assert [eight_bits[n]["fits"] for n in (1, 2, 4, 8)] == [False, False, True, True]
    weights = 7.57e9 * (8.125 / 8)  # codes and scales
    for devices, row in eight_bits.items():
        assert row["weights"] == pytest.approx(weights / devices, rel=0.01)
        parts = row["weights"] + row["other"] + row["cache"] + row["work"]
        assert row["total"] == parts


def test_work_includes_all_experts_of_a_projection():
    """XLA (jax 0.12) needs 1,026 MB for 512 tokens, compiled for an H200 that is not there."""
    one = device_memory(random_model.shape("Qwen3-30B-A3B"), 1, 8, 8192)
    assert one.work == pytest.approx(1.026e9, rel=0.05)


def test_work_includes_scores_on_a_mesh():
    """XLA needs 3,341 MB (``benchmarks/results/absent-gpu-qwen3-8b-mesh-prefill.json``)."""
    config = random_model.shape("Qwen3-8B")
    assert device_memory(config, 2, 8, 65536).work == pytest.approx(3.341e9, rel=0.03)
    # On one GPU cuDNN attends, without scores. There the largest dequantized weight counts.
    assert device_memory(config, 1, 8, 65536).work == device_memory(config, 1, 8, 512).work


@pytest.mark.parametrize("longer", [False, True])
def test_scores_of_a_window_do_not_grow_with_the_context(longer):
    """All layers of one model have windows; a layer of the other one sees the whole context."""
    windows = CASES["mixtral"]
    hf = windows | {"sliding_window": None} if longer else windows
    short, long = (
        device_memory(ModelConfig.from_hf(hf), 2, None, context).work for context in (2**16, 2**17)
    )
    assert (long > 1.9 * short) if longer else (long == short)


def test_a_plan_names_what_cannot_be_cut(capsys):
    assert plan.main(["Qwen3-8B", "--devices", "3"]) == 0
    assert "32 query heads and 8 key heads cannot be divided among 3 devices" in capsys.readouterr().out


def test_an_unknown_model_is_refused(capsys, tmp_path):
    assert plan.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_device_that_has_all_has_the_bytes_of_the_checkpoint():
    config = ModelConfig.from_hf(CONFIGS["qwen3-untied"])
    eight, four = (device_memory(config, 1, bits, 64) for bits in (8, 4))
    # Scales are a sixteenth of the bytes of 8-bit codes here.
    assert 1.8 < eight.weights / four.weights < 2
    assert eight.other - four.other == pytest.approx(0, abs=10_000)
