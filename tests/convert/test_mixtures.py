"""A mixture of experts, converted, read at full and at graded precision, and in text."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import hf_directories
import jax
import jax.numpy as jnp
import matvec_oracle
import numpy as np
import pytest
import tiny_models
from family_cases import CASES
from forward_passes import forward
from mixtures import HF_CONFIG
from random_models import random_state

from checkpoints_tools.calibration import statistics
from checkpoints_tools.calibration.text import Calibration
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert import refit
from checkpoints_tools.convert.coded_experts import CodedExperts
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.options import TRAINED, Options
from checkpoints_tools.convert.plan import make_plan
from checkpoints_tools.source.layer import dense_layer, each_expert, read_layer
from grinqh_jax import checkpoint
from grinqh_jax.cli import inspect
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.statistics import grading_fields
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import Dense, Graded
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.experts import GradedExperts, Router
from grinqh_jax.model.layer_spec import LayerSpec
from grinqh_jax.model.options import missing_kernels
from grinqh_jax.model.weight_counts import weights_read, weights_stored
from pallas_kernels import Activations, GradingStats, NestedWeight, quantize
from pallas_kernels.router.grading_factor import grading_factor

TOKENS = np.random.default_rng(5).integers(0, 256, (2, 60))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture") / "model"
    return tiny_models.write(directory, HF_CONFIG, state=random_state(HF_CONFIG))


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    """The converted mixture: a directory, and the lines that the converter printed."""
    directory = tmp_path_factory.mktemp("converted")
    calib = tiny_models.text_file(directory / "calib.txt")
    arguments = ["--model", str(original), "--out", str(directory / "out"), "--calib", str(calib)]
    assert convert.main(arguments) == 0
    return directory / "out"


@pytest.fixture(scope="module")
def loaded(converted):
    return checkpoint.load(converted)


def losses(logits, tokens) -> np.ndarray:
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)[:, :-1]))
    return -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)


def test_full_bits_keep_the_perplexity(original, loaded):
    dense = load_decoder(open_checkpoint(original), jnp.float32)
    ours, theirs = (losses(forward(model, TOKENS), TOKENS).mean() for model in (loaded.model, dense))
    assert ours == pytest.approx(theirs, abs=0.01)


decode_step = jax.jit(engine.decode_step)


def prefilled(loaded, bits: float):
    """Returns a cache of the first 50 tokens, and thresholds for mean bits."""
    cache = KVCache.create(loaded.config, 2, 60, jnp.float32)
    _, cache = engine.prefill(loaded.model, TOKENS[:, :50], jnp.array([50, 50]), cache)
    targets = jnp.asarray(loaded.quantization.targets)
    return cache, model_thresholds(loaded.model, targets, jnp.array([bits, bits]))


@pytest.mark.slow
def test_decode_steps_at_full_bits_equal_prefill(loaded):
    model = loaded.model
    whole = np.asarray(forward(model, TOKENS))
    cache, thresholds = prefilled(loaded, bits=8.0)
    for position in range(50, 54):
        logits, cache, stats = decode_step(model, TOKENS[:, position], cache, thresholds)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-4 * np.abs(whole).max())
        np.testing.assert_array_equal(stats.bits, 8)


class _Oracle(Graded):
    """Computes every graded product in numpy, and records bits."""

    def __call__(self, name, linear, x):
        thresholds = np.asarray(self.thresholds[name])[0]
        rows = np.asarray(x.array).reshape(-1, x.features)
        experts = np.asarray(getattr(linear, "experts", np.zeros(len(rows)))).reshape(-1)
        y, bits = [], []
        for row, expert in zip(rows, experts, strict=True):
            weight = linear.weight if isinstance(linear.weight, NestedWeight) else None
            weight = linear.weight.expert(int(expert)) if weight is None else weight
            exact = matvec_oracle.graded_matvec(row[None], weight, thresholds)
            y.append(exact.y[0])
            bits.append(exact.bits[0])
        tokens = x.leading[0] * x.leading[1]
        mean = np.reshape(bits, (tokens, -1)).mean(axis=1)
        peak = np.abs(rows).reshape(tokens, -1).max(axis=1)
        self.stats[name] = GradingStats(jnp.asarray(np.stack([mean, peak], axis=-1), jnp.float32))
        return Activations.of(jnp.asarray(np.reshape(y, (*x.leading, -1)), jnp.float32))


@pytest.mark.slow
def test_graded_decode_steps_equal_the_oracle(loaded):
    model, names = loaded.model, linear_names(loaded.config)
    cache, thresholds = prefilled(loaded, bits=3.0)
    logits, _, stats = decode_step(model, TOKENS[:, 50], cache, thresholds)
    oracle = _Oracle({name: thresholds[name] for name in names})
    hidden, _ = model.hidden(TOKENS[:, 50:51], cache.lengths[:, None], oracle, cache.layers)
    expected = model.logits(hidden, oracle)[:, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    bits = np.stack([oracle.stats[name].bits for name in names], axis=-1)
    np.testing.assert_allclose(stats.bits, bits, atol=0.02)
    shares = layer_shares(loaded.config)
    assert (np.abs(np.asarray(stats.bits) @ shares - 3) < 1).all()
    assert len(np.unique(bits[:, names.index("layers.0.experts_gate_up")])) == 2


def test_only_the_weights_of_chosen_experts_count_as_read(loaded):
    config, model = loaded.config, loaded.model
    read, stored = weights_read(config), weights_stored(config)
    ratio = config.num_experts // config.layers[0].experts.chosen
    for name in linear_names(config):
        assert stored[name] == read[name] * (ratio if "experts" in name else 1), name
    packed = np.full((1, len(read), 2), 4.0)
    fields = grading_fields(model, GradingStats(packed))
    norms = 2 * (2 * 2 * 64 + 2 * 2 * 16 + 64 + 64)  # of layers and heads, the final one, an embedding
    router = 2 * 64 * 6
    assert fields["realised_bits"] == pytest.approx(4)
    assert fields["bytes_per_token"] == sum(read.values()) * (4 + 0.125) / 8 + norms + router


@pytest.mark.slow
def test_rarely_chosen_experts_are_graded_like_the_others(original, tmp_path):
    """A router that never chooses an expert leaves it the thresholds of its layer and finite weights."""
    state = random_state(HF_CONFIG)
    router = state["model.layers.0.mlp.gate.weight"]
    router[4] = -100 * np.abs(router).sum(axis=0)  # the embedding below is positive, so is every input
    state["model.embed_tokens.weight"] = np.abs(state["model.embed_tokens.weight"])
    model = tiny_models.write(tmp_path / "model", HF_CONFIG, state=state)
    calib = tiny_models.text_file(tmp_path / "calib.txt")
    arguments = ["--model", str(model), "--out", str(tmp_path / "out"), "--calib", str(calib)]
    assert convert.main([*arguments, "--basis", "original", "--tokens", "512"]) == 0
    experts = checkpoint.load(tmp_path / "out").model.layers[0].experts_gate_up
    weight, kernel = experts.weight.expert(4), state["model.layers.0.mlp.experts.4.up_proj.weight"].T
    error = matvec_oracle.dequantize(weight, 4)[:, 72:] - kernel
    assert np.abs(error).max() < 0.02 * np.abs(kernel).max()
    assert np.isfinite(experts.thresholds[...]).all()


def test_inputs_count_once_for_each_chosen_expert(original):
    source = open_checkpoint(original)
    layer = dense_layer(source, 0, *read_layer(source, 0), jnp.float32)
    hidden = np.random.default_rng(0).standard_normal((2, 20, 64)).astype(np.float32)
    seen = statistics.through_layer(layer, hidden.copy())
    assert seen["experts_gate_up"].counts.sum() == 2 * 16 * 2 * 64  # windows, positions, experts, channels
    assert seen["experts_down"].counts.sum() == 2 * 16 * 2 * 72


def test_the_grading_factor_is_the_probability_as_a_power_of_two():
    factor = np.asarray(grading_factor(jnp.array([1.0, 0.5, 0.3, 0.26, 1e-3, 0.0])))
    np.testing.assert_array_equal(factor, [1, 0.5, 0.25, 0.25, 2.0**-10, 2.0**-16])


def test_a_router_chooses_the_largest_probabilities(loaded):
    mixture = loaded.config.layers[0].experts
    kernel = np.random.default_rng(1).standard_normal((64, 6)).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    scores = x.astype(np.float64) @ kernel
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    experts, probabilities, inputs = Router(jnp.asarray(kernel))(Activations.of(jnp.asarray(x)), mixture)
    best = np.argsort(-p, axis=-1)[:, :2]
    np.testing.assert_array_equal(experts, best)
    chosen = np.take_along_axis(p, best, axis=-1)
    np.testing.assert_allclose(probabilities, chosen / chosen.sum(axis=-1, keepdims=True), rtol=1e-4)
    factor = np.asarray(grading_factor(probabilities))[..., None]
    np.testing.assert_array_equal(inputs.array, x[:, None] * factor)


def test_the_converter_says_what_it_leaves_out(original):
    tokens = np.zeros((64, 256), np.int32)
    plan = make_plan(
        open_checkpoint(original), Calibration(windows=tokens, other=tokens, name="zeros"), Options()
    )
    assert (plan.refit, plan.gains) == (("qkv", "o", "gate_up", "down", "lm_head"), TRAINED)
    assert plan.not_done == ("weights of experts were not refitted: each gets few of the calibration tokens",)


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
def test_refit_states_pass_through_a_mixture(original, biased, tmp_path):
    """With thresholds of 0 the graded model reads all 8 bits, and its states are the exact ones."""
    source = open_checkpoint(hf_directories.write(tmp_path, CASES["gpt_oss"]) if biased else original)
    hidden = np.random.default_rng(8).standard_normal((2, 30, 64)).astype(np.float32)
    layer = dense_layer(source, 0, *read_layer(source, 0), jnp.float32)
    block = layer.spec.blocks[1]
    names = block.reads.name, block.writes.name
    tables = {f"layers.0.{name}": np.zeros((2, 4), np.float32) for name in names}
    states = refit.RefitStates(hidden, hidden[:1], tables, (1.0, 8.0), source.config.layers)
    states.apply_norm(layer.post_norm)
    experts = {name: _quantized(getattr(layer, name)) for name in names}
    gains = {name: np.ones(4, np.float32) for name in names}
    inputs = Activations.of(layer.post_norm(jnp.asarray(hidden)))
    expected = hidden + layer.mixture("layer", block, block.mixer, inputs, Dense()).array
    states.advance_mixture("layers.0.", layer, block, experts.__getitem__, gains)
    assert all(getattr(layer, name) is experts[name] for name in names)
    np.testing.assert_allclose(states._exact.stream, expected, atol=1e-5)
    np.testing.assert_allclose(states._other.stream, expected[:1], atol=1e-5)
    error = np.abs(np.stack(states._graded.stream) - expected).max()
    assert 0 < error < 0.02 * np.abs(expected).max()


def _quantized(experts) -> CodedExperts:
    weights = [quantize(kernel.astype(jnp.float32)) for kernel in each_expert(experts.kernel[...])]
    planes, scales = (jnp.stack([getattr(w, leaf) for w in weights]) for leaf in ("planes", "scales"))
    sizes = {"in_features": experts.in_features, "out_features": experts.out_features}
    table = jnp.zeros((2, 4))
    bias = None if experts.bias is None else experts.bias[...].astype(jnp.float32)
    leaves = planes, scales, table, jnp.ones(4), jnp.zeros(()), bias
    return CodedExperts.of_planes(GradedExperts(*leaves, **sizes))


@pytest.mark.slow
def test_coded_experts_are_coded_linear_layers_of_each_row(loaded):
    """Products, and gradients with respect to inputs and level gains."""
    experts = loaded.model.layers[0].experts_gate_up
    rng = np.random.default_rng(7)
    chosen, x = rng.integers(0, 6, (2, 5, 2)), rng.standard_normal((2, 5, 2, 64)).astype(np.float32)
    thresholds, gains = jnp.array([[[0.2, 0.5, 1, 1.5]], [[0.5, 1, 1.5, 2]]]), jnp.array([0.8, 0.9, 1.1, 1])
    weights = jnp.asarray(rng.standard_normal((2, 5, 2, 144)), jnp.float32)
    of_planes = CodedExperts.of_planes(experts)
    bias = jnp.asarray(rng.standard_normal((6, 144)), jnp.float32)
    factors = jnp.asarray(rng.uniform(0.5, 2, (2, 5, 2)), jnp.float32)
    with_bias = CodedExperts(of_planes.codes[...], of_planes.scales[...], of_planes.thresholds[...], bias)
    coded = with_bias.choose(jnp.asarray(chosen), factors)

    def linear(expert: int, factor) -> CodedLinear:
        return CodedLinear(coded.codes[expert], coded.scales[expert], coded.thresholds, bias[expert] * factor)

    def of_experts(x, gains):
        y = coded.graded(x, thresholds, gains)
        return jnp.sum(y * weights), y

    def of_each_row(x, gains):
        rows = [
            linear(chosen[s, t, c], factors[s, t, c]).graded(x[s, t, c], thresholds[s, 0], gains)
            for s, t, c in np.ndindex(2, 5, 2)
        ]
        y = jnp.stack(rows).reshape(2, 5, 2, 144)
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.value_and_grad(of_experts, (0, 1), has_aux=True)(jnp.asarray(x), gains)
    (_, expected), of_rows = jax.value_and_grad(of_each_row, (0, 1), has_aux=True)(jnp.asarray(x), gains)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for actual, desired in zip(gradients, of_rows, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-4)


def test_inspect_shows_a_mixture(original, converted, capsys):
    for directory in (original, converted):
        assert inspect.main([str(directory), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["family"] == "qwen3_moe"
        assert any("mixture of experts, 2 chosen for each token" in option for option in report["options"])
        assert (report["sizes"]["experts"], report["sizes"]["expert_intermediate"]) == (6, 72)
        config = open_checkpoint(original).config
        assert report["parameters_read_per_token"] == sum(weights_read(config).values())
        assert report["computed_by_xla"] == []


def test_inspect_says_why_xla_computes_routers_and_activation_functions(original):
    description = open_checkpoint(original).config
    mixture = dataclasses.replace(description.layers[0].experts, chosen=33, activation="gelu_tanh")
    block = dataclasses.replace(description.layers[0].blocks[1], mixer=mixture)
    changed = dataclasses.replace(description, layers=(LayerSpec((description.layers[0].blocks[0], block)),))
    assert missing_kernels(changed) == [
        "the activation function of experts, because it is not SiLU",
        "routers, because the kernel chooses at most 32 experts, not 33",
    ]
    odd = dataclasses.replace(description, num_experts=7)
    assert missing_kernels(odd) == [
        "routers, because the kernel takes an even number of up to 512 experts, not 7"
    ]


@pytest.mark.slow
def test_a_converted_mixture_generates_text(converted):
    command = [sys.executable, "-m", "grinqh_jax.generate", "--model", converted, "--prompt", "The grey"]
    command += ["--max-tokens", "12", "--bits", "3", "--temperature", "0", "--json"]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    report = json.loads(result.stdout)
    assert 2 < report["realised_bits"] < 4
