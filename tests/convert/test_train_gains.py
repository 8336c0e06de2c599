"""Trained level gains: the layer-by-layer gradient, compared with the whole model's, and the training."""

import dataclasses

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
import tiny_models
from hf_directories import LLAMA3, QWEN3

from checkpoints_tools.convert import coded_linear, graded_divergence, train_gains
from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.graded_divergence import divergence
from checkpoints_tools.convert.graded_model import GradedModel, WindowStates
from checkpoints_tools.source import head as source_head
from checkpoints_tools.source.array_cache import ArrayCache
from grinqh_jax import checkpoint
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.model.apply import HEAD, Graded
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.experts import ChosenGraded
from grinqh_jax.model.linear import GradedLinear
from pallas_kernels import codes, dequantize, layout
from pallas_kernels.experts import experts_matvec

BITS = (1.5, 2.0, 3.0)
SCORED = slice(4, None)
"""Scored positions of a window."""


MODELS = {
    "qwen3-tied": QWEN3,
    "llama-untied": LLAMA3 | {"vocab_size": 1200},  # Two vocabulary blocks.
    "mixture": mixtures.HF_CONFIG,
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """``(source, converted)``: a tiny model, and its graded form in the original basis."""
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_models.write(directory / "model", MODELS[request.param])
    calib = tiny_models.text_file(directory / "calib.txt")
    flags = ["--calib", str(calib), "--basis", "original", "--gains", "fitted"]
    assert convert.main(["--model", str(model), "--out", str(directory / "out"), *flags]) == 0
    return open_checkpoint(model), checkpoint.load(directory / "out", jnp.float32)


def graded_model(pair) -> GradedModel:
    """Returns the converted model, read from memory."""
    source, converted = pair
    model = converted.model

    def leaves(linear):
        names = ("planes", "scales", "thresholds", "max_activation")
        return {name: getattr(linear, name)[...] for name in names}

    def read(name):
        if name == HEAD:
            return {"blocks": {str(i): leaves(block) for i, block in enumerate(model.lm_head.blocks)}}
        if name == "norm":
            return {"scale": model.norm.scale[...]}
        _, i, name = name.split(".")
        module = getattr(model.layers[int(i)], name)
        if name in model.layers[int(i)].spec.names:
            return leaves(module)
        return {"kernel": module.kernel[...]} if name == "router" else {"scale": module.scale[...]}

    ends = np.cumsum([block.out_features for block in model.lm_head.blocks])[:-1]
    tokens = dict(zip(model.lm_head.names, np.split(np.asarray(model.lm_head.tokens()), ends), strict=True))
    return GradedModel(
        original=source,
        embedding=source,
        read=read,
        vocabulary_blocks=tokens,
        targets=converted.quantization.targets,
        compute_dtype=jnp.float32,
    )


def some_gains(model) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(np.append(rng.uniform(0.8, 1.2, 3), 1), jnp.float32)
        for name in linear_names(model.config)
    }


class WithGains(Graded):
    """The product's graded reading with given level gains."""

    def __init__(self, thresholds, gains):
        super().__init__(thresholds)
        self.gains = gains

    def __call__(self, name, linear, x):
        if isinstance(linear, ChosenGraded):
            weight = dataclasses.replace(linear.weight, level_gains=self.gains[name])
            # The only implementation that has a gradient.
            arguments = x, weight, linear.experts, self.thresholds[name]
            return experts_matvec(*arguments, implementation="reference")[0].astype(x.dtype)
        leaves = {leaf: getattr(linear, leaf)[...] for leaf in ("planes", "scales", "thresholds")}
        linear = type(linear)(
            **leaves,
            level_gains=self.gains[name],
            max_activation=linear.max_activation[...],
            in_features=linear.in_features,
            out_features=linear.out_features,
        )
        return super().__call__(name, linear, x)


def whole_model_divergence(pair, tokens, gains, bits) -> jax.Array:
    """Computes the divergence from all logits of both models, graded by the product's own strategy."""
    source, converted = pair
    thresholds = model_thresholds(
        converted.model, jnp.asarray(converted.quantization.targets), jnp.float32(bits)
    )
    log_q = jax.nn.log_softmax(converted.model(tokens, WithGains(thresholds, gains)))
    log_p = jax.nn.log_softmax(load_decoder(source, jnp.float32)(tokens))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)[:, SCORED])


WINDOWS = np.random.default_rng(6).integers(0, 256, (3, 40)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["qwen3-tied", "llama-untied", "mixture"], indirect=True)
def test_the_gradient_matches_the_whole_models(pair, monkeypatch):
    """The gradient of each window, and of several windows at once.

    Two programs round differently, so an activation on a threshold may be read at another level in one.
    The divergence of such a window differs, so only windows whose divergences agree are compared.
    """
    monkeypatch.setattr(coded_linear, "FINE_LEVEL", 4)  # The whole model reads each level as it is.
    monkeypatch.setattr(graded_divergence, "VALUES_IN_MEMORY", 1)  # Ranges of one tile.
    monkeypatch.setattr(source_head, "VALUES_IN_MEMORY", 120 * 128)  # Ranges of about 120 tokens.
    gains, model = some_gains(pair[1].model), graded_model(pair)
    windows = np.random.default_rng(6).integers(0, 256, (5, 24)).astype(np.int32)
    bits = (1.5, 2.0, 3.0, 2.0, 1.5)

    @jax.jit
    @jax.value_and_grad
    def log_divergence(gains, window, bits):  # The training minimizes the sum of the logarithms.
        return jnp.log(whole_model_divergence(pair, window, gains, bits))

    def layer_by_layer(some):
        states = WindowStates.compute(model, windows[some])
        return divergence(model, model.head(), states, gains, bits[some])

    whole = [log_divergence(gains, window[None], b) for window, b in zip(windows, bits, strict=True)]
    jax.clear_caches()  # Programs of other tests read fine levels together.
    single = [layer_by_layer(slice(i, i + 1)) for i in range(len(bits))]
    agree = [
        abs(divergences[0] / np.exp(log) - 1) < 2e-4
        for (log, _), (divergences, _) in zip(whole, single, strict=True)
    ]
    assert sum(agree) >= 3
    for i in np.flatnonzero(agree):
        assert_gradients_agree(single[i][1], whole[i][1])

    chosen = slice(0, 3)
    divergences, gradient = layer_by_layer(chosen)
    singly = np.array([divergences[0] for divergences, _ in single[chosen]])
    if np.allclose(divergences, singly, rtol=2e-4, atol=0):
        sums = {name: sum(each[name] for _, each in single[chosen]) for name in gains}
        assert_gradients_agree(gradient, sums)
    else:
        assert np.isclose(divergences, singly, rtol=2e-4, atol=0).any()


def assert_gradients_agree(actual, desired):
    assert actual.keys() == desired.keys()
    for name, expected in desired.items():
        tolerance = 5e-3 * np.abs(expected[:-1]).max()
        np.testing.assert_allclose(actual[name], expected, rtol=5e-3, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("max_bits", "read"), [(8, (0, 1, 2, 4, 4)), (6, (0, 1, 2, 3)), (2, (0, 1))])
def test_a_graded_product_matches_the_dequantized_levels(max_bits, read):
    """Levels of 6 bits and more read all digits."""
    rng = np.random.default_rng(3)
    planes = max_bits // 2
    weight = codes.quantize(jnp.asarray(rng.standard_normal((200, 700)), jnp.float32), max_bits=max_bits)
    x = rng.standard_normal((2, 5, 200)).astype(np.float32)
    thresholds = np.float32([[0.3, 0.6, 1.0, 1.5], [0.2, 0.3, 0.4, 0.5]])[:, None, :planes]
    gains = np.float32([0.8, 0.9, 1.1, 1.0])[:planes]
    level = (np.abs(x)[..., None] >= thresholds[:, :, None]).sum(axis=-1)
    kernels = np.stack(
        [np.zeros((200, 700)), *(np.asarray(dequantize(weight, n)) for n in range(1, planes + 1))]
    )
    expected = np.zeros((2, 5, 700))
    for row in np.ndindex(2, 5):
        levels = level[row]
        inputs = np.append(0, gains.astype(np.float64))[levels] * x[row]
        expected[row] = inputs @ kernels[np.array(read)[levels], np.arange(200)]
    linear = GradedLinear(
        weight.planes,
        weight.scales,
        jnp.zeros((2, planes)),
        weight.level_gains,
        jnp.zeros(()),
        in_features=200,
        out_features=700,
    )
    start, stop = layout.TILE, 700
    block = CodedLinear.of_planes(linear).select(start, stop)
    product = block.graded(jnp.asarray(x), *map(jnp.asarray, (thresholds, gains)))
    np.testing.assert_allclose(product, expected[..., start:stop], rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_graded_product_matches_the_dequantized_levels():
    rng = np.random.default_rng(4)
    k, n = 150, 40
    weight = codes.quantize(jnp.asarray(rng.standard_normal((k, n)), jnp.float32))
    x, change = (rng.standard_normal((6, size)).astype(np.float32) for size in (k, n))
    thresholds, gains = np.float32([0.3, 0.6, 1.0, 1.5]), np.float32([0.8, 0.9, 1.1, 1.0])
    digits = codes.unpack(weight.planes)[:, :k, :n]
    stored = sum(digit << shift for digit, shift in zip(digits, (6, 4, 2, 0), strict=True))
    linear = CodedLinear(stored.astype(jnp.uint8), weight.scales[:, :n], jnp.zeros((2, 4)))

    def product(x, gains, outputs=None):
        return linear.graded(x, jnp.asarray(thresholds), gains, outputs)

    outputs = product(jnp.asarray(x), jnp.asarray(gains))
    level = (np.abs(x)[..., None] >= thresholds).sum(axis=-1)
    kernels = np.stack([np.zeros((k, n)), *(np.asarray(dequantize(weight, read)) for read in (1, 2, 4, 4))])
    pushed = np.einsum("tn,tkn->tk", change, kernels[level, np.arange(k)])
    by_x = pushed * np.append(0, gains)[level]
    by_gains = [np.sum(pushed * x * (level == read)) for read in range(1, 5)]
    for known in (None, outputs + 1):  # Given outputs are returned and do not change the gradient.
        arguments = jnp.asarray(x), jnp.asarray(gains)
        result, pull_back = jax.vjp(lambda *at, known=known: product(*at, known), *arguments)
        np.testing.assert_array_equal(result, outputs if known is None else known)
        actual_by_x, actual_by_gains = pull_back(jnp.asarray(change))
        np.testing.assert_allclose(actual_by_x, by_x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(actual_by_gains, by_gains, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["qwen3-tied"], indirect=True)
def test_training_lowers_the_divergence_on_other_text(pair, monkeypatch):
    """The divergence falls at the trained settings and between them."""
    monkeypatch.setattr(train_gains, "STEPS", 8)
    seen, unseen = np.random.default_rng(8).integers(0, 256, (2, 30, 48)).astype(np.int32)
    names = linear_names(pair[1].config)
    initial = {name: np.float32([1.15, 1.05, 1, 1]) for name in names}
    steps = []
    trained = train_gains.train_gains(graded_model(pair), seen, initial, steps.append)
    assert len(steps) == 8
    assert list(trained) == names
    for gains in trained.values():
        assert gains.dtype == np.float32
        assert gains[-1] == 1
        assert (gains > 0).all()

    @jax.jit
    def loss(gains, bits):
        return whole_model_divergence(pair, jnp.asarray(unseen), gains, bits)

    for bits in (1.5, 2.0, 2.5, 3.0):
        before, after = loss(initial, jnp.float32(bits)), loss(trained, jnp.float32(bits))
        assert after < 0.97 * before, bits


@pytest.mark.parametrize("pair", ["qwen3-tied"], indirect=True)
@pytest.mark.parametrize(("limit", "reads"), [(1 << 30, 1), (0, 4)])
@pytest.mark.slow
def test_layers_are_read_once_if_the_cache_holds_them(pair, monkeypatch, limit, reads):
    monkeypatch.setattr(train_gains, "STEPS", 2)
    model, read = graded_model(pair), []
    counted = dataclasses.replace(
        model, read=lambda name: (read.append(name), model.read(name))[1], cache=ArrayCache(limit)
    )
    initial = {name: np.ones(4, np.float32) for name in linear_names(pair[1].config)}
    train_gains.train_gains(counted, WINDOWS, initial)
    of_layers = [name for name in linear_names(pair[1].config) if name.startswith("layers.")]
    assert {name: read.count(name) for name in of_layers} == dict.fromkeys(of_layers, reads)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["qwen3-tied"], indirect=True)
def test_later_steps_compile_nothing(pair, monkeypatch):
    monkeypatch.setattr(train_gains, "STEPS", 3)
    compiled, programs = [], []

    def listen(event, duration, **metadata):
        if "backend_compile" in event:
            compiled.append(metadata)

    def count_step(note):
        programs.append(len(compiled))
        compiled.clear()

    initial = {name: np.ones(4, np.float32) for name in linear_names(pair[1].config)}
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train_gains.train_gains(graded_model(pair), WINDOWS, initial, count_step)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    first, *later = programs
    assert first > 20
    assert later == [0, 0]


def test_training_windows_cover_the_whole_text_once(monkeypatch):
    monkeypatch.setattr(train_gains, "WINDOW", 512)
    windows = np.arange(3 * 1100, dtype=np.int32).reshape(3, 1100)
    chosen = train_gains.training_windows(windows, 100)
    assert chosen.shape == (6, 512)
    starts = sorted(chosen[:, 0].tolist())
    assert starts == [0, 512, 1100, 1612, 2200, 2712]
    assert len(train_gains.training_windows(windows, 4)) == 4
    assert train_gains.training_windows(windows[:, :300], 100).shape == (3, 300)
