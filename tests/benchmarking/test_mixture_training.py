"""``benchmarks/mixture.py``: an upcycled model is the dense one, and training makes the experts differ."""

import importlib
import json
import sys
from pathlib import Path

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.config import ModelConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = tiny_models.TEXT * 3


@pytest.fixture
def dense(tmp_path):
    return open_checkpoint(tiny_models.write(tmp_path / "dense", hf_directories.QWEN3))


@pytest.fixture
def imported(monkeypatch):
    """Imports a module of ``benchmarks``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("mixture", "mixture_model"):
        sys.modules.pop(name, None)


def test_a_mixture_without_noise_computes_what_the_dense_model_computes(dense, imported):
    model, training = imported("mixture_model"), imported("mixture")
    upcycling = model.Upcycling(experts=6, chosen=2, noise=0.0)
    parameters = model.upcycled(dense, upcycling, np.random.default_rng(0))
    config = ModelConfig.from_hf(model.hf_config(dense.hf_config, upcycling))
    tokens = np.random.default_rng(1).integers(0, 300, (2, 40))
    means = model.losses(parameters, jnp.asarray(tokens), config, capacity=None)
    expected = training.held_out_losses(dense, {"text": tokens})["text"]
    assert float(means.cross_entropy) == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(np.sum(means.usage, axis=1), 1, rtol=1e-5)
    assert means.usage.max() > means.usage.min()
    # Both slices get the same tokens, because their routers are the same.
    np.testing.assert_allclose(means.usage[:, :3], means.usage[:, 3:])


def test_rows_beyond_the_capacity_are_dropped(dense, imported):
    model = imported("mixture_model")
    upcycling = model.Upcycling(experts=6, chosen=2, noise=0.0)
    parameters = model.upcycled(dense, upcycling, np.random.default_rng(0))
    config = ModelConfig.from_hf(model.hf_config(dense.hf_config, upcycling))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 300, (2, 40)))
    whole, enough, little = (
        float(model.losses(parameters, tokens, config, capacity=capacity).cross_entropy)
        for capacity in (None, 6.0, 0.2)
    )
    assert enough == pytest.approx(whole, abs=1e-5)
    assert little != pytest.approx(whole, abs=1e-3)


@pytest.mark.slow
def test_training_in_two_runs(dense, imported, monkeypatch, tmp_path, capsys):
    """The losses fall below the dense model's, experts of a slice move apart, and a stopped run resumes."""
    (tmp_path / "text.txt").write_text(TEXT[: len(TEXT) // 2])
    (tmp_path / "held_out.txt").write_text(TEXT[len(TEXT) // 2 :])
    arguments = ["--model", dense.directory, "--text", tmp_path / "text.txt"]
    arguments += ["--held-out", tmp_path / "held_out.txt", "--experts", 4, "--chosen", 2, "--noise", 0.02]
    arguments += ["--steps", 24, "--batch", 2, "--length", 64, "--rate", 3e-3]

    def run(*more) -> None:
        monkeypatch.setattr(sys, "argv", ["mixture.py", *map(str, [*arguments, *more])])
        assert imported("mixture").main() == 0

    run("--out", tmp_path / "whole")
    run("--out", tmp_path / "stopped", "--seconds", 0)
    assert "run the same command to resume" in capsys.readouterr().out
    assert not (tmp_path / "stopped").exists()
    run("--out", tmp_path / "stopped")
    whole, resumed = (
        json.loads((tmp_path / out / "training.json").read_text()) for out in ("whole", "stopped")
    )
    assert whole["loss_mixture"] == pytest.approx(resumed["loss_mixture"], abs=1e-3)
    assert whole["loss_mixture"]["held_out"] < whole["loss_dense"]["held_out"] - 1
    assert whole["cosine_of_experts"]["experts_gate_up"]["mean"] < 0.9
    mixture = open_checkpoint(tmp_path / "whole")
    assert (mixture.config.num_experts, mixture.config.layers[0].experts.chosen) == (4, 2)
    assert mixture.config.expert_size == 48
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_decoder(mixture, jnp.float32)))


def test_other_models_are_refused(imported):
    model = imported("mixture_model")
    with pytest.raises(ValueError, match=r"model_type is 'llama'"):
        model.hf_config(hf_directories.LLAMA3, model.Upcycling(4, 2, 0.0))
    with pytest.raises(ValueError, match=r"4 chosen experts must divide 6 experts and 96 channels"):
        model.hf_config(hf_directories.QWEN3, model.Upcycling(6, 4, 0.0))
