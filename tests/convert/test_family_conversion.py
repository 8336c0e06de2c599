"""The converter keeps the function of a model of every family."""

import json

import hf_directories
import jax.numpy as jnp
import mxfp4_models
import numpy as np
import pytest
from family_cases import CASES, TOKENS
from forward_passes import forward
from marks import slow
from random_models import random_state

from checkpoints_tools.calibration.text import Calibration
from checkpoints_tools.convert.driver import convert
from checkpoints_tools.convert.options import ORIGINAL, PRINCIPAL, Options
from checkpoints_tools.convert.plan import make_plan
from checkpoints_tools.convert.principal_basis import RotatedCheckpoint
from grinqh_jax import checkpoint
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.options import rotation_obstacle

OBSTACLES = {name: rotation_obstacle(ModelConfig.from_hf(config)) for name, config in CASES.items()}
ROTATABLE = [name for name, obstacle in OBSTACLES.items() if obstacle is None]
ROTATED = ("qwen2-tied-yarn", "qwen3-moe-window", "phi3-partial-window", "qwen3_5")
"""Cases whose rotation the default tests check: a tied head, experts, joint projections, delta nets."""

CONVERTED = (
    "qwen2-tied-yarn",
    "qwen2-moe",
    "qwen3-moe-window",
    "mixtral",
    "olmoe",
    "gpt_oss",
    "smollm3",
    "granite",
    "phi3-partial-window",
    "olmo3-window-yarn",
    "gemma3",
    "qwen3_5",
    "qwen3_5-moe",
    "qwen3-next",
)
"""Cases that together have every option that the converter sees."""

PERPLEXITY_BOUNDS = {"olmoe": 0.03}
"""Largest relative change of the perplexity at full bits, if not 0.01. Three other roundings of this case's
weights to 8 bits change it by -2.0 to 0.8 %, because tokens then choose other experts."""


def source_of(directory, name):
    hf_directories.write(directory, CASES[name], state=random_state(CASES[name]))
    return open_checkpoint(directory)


def plan_of(source, windows: int, **options):
    tokens = np.random.default_rng(23).integers(0, source.config.vocab_size, (windows, 64)).astype(np.int32)
    return make_plan(source, Calibration(windows=tokens, other=tokens, name="random"), Options(**options))


def perplexity(model) -> float:
    """Returns the perplexity of random tokens; so many that the noise of 8 bits averages out."""
    tokens = np.random.default_rng(29).integers(0, model.config.vocab_size, (24, 64))
    logits = np.asarray(model(tokens), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()))


@pytest.mark.parametrize("name", [*ROTATED, *slow(*(name for name in ROTATABLE if name not in ROTATED))])
def test_any_rotation_keeps_the_function(name, tmp_path):
    source = source_of(tmp_path, name)
    gaussian = np.random.default_rng(2).standard_normal((source.config.hidden_size,) * 2)
    axes = np.ascontiguousarray(np.linalg.qr(gaussian)[0], np.float32)
    expected = np.asarray(forward(load_decoder(source, jnp.float32), TOKENS))
    logits = np.asarray(forward(load_decoder(RotatedCheckpoint(source, axes), jnp.float32), TOKENS))
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4


@pytest.mark.parametrize("name", [name for name, obstacle in OBSTACLES.items() if obstacle is not None])
def test_the_basis_is_left_out_by_name_where_blocks_have_norms_after_them(name, tmp_path):
    plan = plan_of(source_of(tmp_path, name), 4, basis=PRINCIPAL)
    assert plan.options.basis == ORIGINAL
    assert any(OBSTACLES[name] in line for line in plan.not_done)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_full_bits_keep_the_perplexity(name, tmp_path):
    source = source_of(tmp_path / "model", name)
    convert(plan_of(source, 8, refit=False, gains="fitted"), tmp_path / "out")
    model, bound = checkpoint.load(tmp_path / "out").model, PERPLEXITY_BOUNDS.get(name, 0.01)
    assert perplexity(model) == pytest.approx(perplexity(load_decoder(source, jnp.float32)), rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-tied-yarn", "qwen3-moe", "granite", "gemma3", "qwen3_5"])
def test_refit_and_trained_gains_keep_the_perplexity(name, tmp_path):
    source = source_of(tmp_path / "model", name)
    plan = plan_of(source, 128)
    projections = {"qkv", "o", "gate_up", "down", "lm_head"}
    assert set(plan.refit) == projections | (
        {"delta_in", "delta_out"} if source.config.is_recurrent else set()
    )
    assert plan.gains == "trained"
    convert(plan, tmp_path / "out")
    model = checkpoint.load(tmp_path / "out").model
    assert perplexity(model) == pytest.approx(perplexity(load_decoder(source, jnp.float32)), rel=0.02)


@pytest.mark.slow
def test_gpt_oss_in_mxfp4_converts_with_all_stages(tmp_path):
    """The refit and the training of level gains read the biases of experts, and sinks."""
    packed, _ = mxfp4_models.packed_state()
    hf_directories.write(tmp_path / "model", mxfp4_models.QUANTIZED, packed)
    source = open_checkpoint(tmp_path / "model")
    plan = plan_of(source, 64)
    assert plan.options.gains == "trained"
    convert(plan, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "grinqh"
    expected = perplexity(load_decoder(source, jnp.float32))
    assert perplexity(loaded.model) == pytest.approx(expected, rel=0.01)
