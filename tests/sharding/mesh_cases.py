"""Models on 2, 4 and 8 devices give the answers of one device. ``test_mesh`` runs this file in a process.

The process has eight CPU devices. Tiny models run in the default tests, those of all families and the long
text in the slow ones.
"""

import functools
from pathlib import Path

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CONFIGS, TARGETS, graded_model_tree, graded_tree, state_tree

import checkpoints_tools
from grinqh_jax.benchmarking import measure as benchmark
from grinqh_jax.benchmarking import random_model
from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.decoding.prompt_cache import PromptCache
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.evaluation.scoring import score
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.model.partition import AXIS
from grinqh_jax.serving.engine import Engine
from grinqh_jax.sharding.cutting import cut_decoder
from grinqh_jax.sharding.memory import device_memory
from grinqh_jax.sharding.mesh import make_mesh
from grinqh_jax.sharding.program import on_mesh, zeros_on_mesh
from pallas_kernels import grading

WIDE = CONFIGS["qwen3-untied"] | {
    "num_hidden_layers": 1,
    "vocab_size": 1300,
    "intermediate_size": 700,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 24,
}
"""Several vocabulary blocks, six groups of channels in the MLP, and heads that end inside a group. On eight
devices, two share a key head."""

TOKENS = np.random.default_rng(5).integers(0, 96, (2, 24))
SLOW = pytest.mark.slow
TEXT = Path(checkpoints_tools.__file__).parent / "data" / "calibration.txt"


@jax.jit
@on_mesh
def forward(model, tokens, thresholds):
    """Returns dense logits, graded logits, and the statistics of grading; dense logits alone without it."""
    decoder = model.module
    if thresholds is None:
        return decoder(tokens)
    graded = Graded(thresholds)
    logits = decoder(tokens, graded)
    return decoder(tokens), logits, graded.stats


def model_of(hf_config, *, graded=True):
    config, tree = state_tree(hf_config)
    if not graded:
        return Decoder.from_tree(config, tree, jnp.float32)
    apart = {}
    for i, spec in enumerate(config.layers):
        layer = tree["layers"][str(i)]
        if spec.experts is not None:
            names = [projection.name for projection in spec.projections if projection.of_experts]
            kept = {spec.experts.router: layer.pop(spec.experts.router)}
            apart[str(i)] = kept | {name: graded_experts(layer.pop(name)["kernel"]) for name in names}
    tree = graded_model_tree(tree)
    for i, leaves in apart.items():
        tree["layers"][i] |= leaves
    return Decoder.from_tree(config, tree, jnp.float32)


def graded_experts(kernels):
    """Returns the leaves of experts; they share thresholds and level gains."""
    experts = [graded_tree({"kernel": kernel}) for kernel in kernels]
    stacked = {name: jnp.stack([expert[name] for expert in experts]) for name in ("planes", "scales")}
    return experts[0] | stacked


def mesh_of(devices, config):
    mesh = make_mesh(f"tp={devices}", config)
    assert mesh is not None
    assert mesh.size == devices
    return mesh


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def assert_same_answers(model, devices, bits=(2.5, 8.0)):
    cut = FlatModel(cut_decoder(model, mesh_of(devices, model.config)))
    thresholds = model_thresholds(model, jnp.asarray(TARGETS), jnp.asarray(bits))
    expected, actual = (forward(each, TOKENS, thresholds) for each in (FlatModel(model), cut))
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    assert actual[2].keys() == expected[2].keys()
    for name, stats in expected[2].items():
        # An equal mean of the levels of up to 1,400 channels: no level differs.
        np.testing.assert_allclose(actual[2][name].bits, stats.bits, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(actual[2][name].max_abs, stats.max_abs, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 8])
def test_a_cut_model_gives_the_same_logits_and_statistics(devices):
    assert_same_answers(model_of(WIDE), devices)


@SLOW
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", family_cases.CASES)
def test_every_family_gives_the_same_logits_and_statistics(name, devices):
    config = ModelConfig.from_hf(family_cases.CASES[name])
    if any(spec.delta_net is not None for spec in config.layers):
        with pytest.raises(UsageError, match="no rule cuts its axis delta_"):
            make_mesh(f"tp={devices}", config)
    else:
        assert_same_answers(model_of(family_cases.CASES[name]), devices)


@SLOW
def test_a_mixture_gives_the_same_logits_and_statistics():
    mixture = family_cases.CASES["qwen3-moe"] | {"moe_intermediate_size": 200, "num_hidden_layers": 1}
    assert_same_answers(model_of(mixture), 2)


@SLOW
@pytest.mark.parametrize("name", ["qwen2-tied-yarn", "qwen3-moe"])
def test_a_dense_model_gives_the_same_logits(name):
    model = model_of(family_cases.CASES[name], graded=False)
    cut = FlatModel(cut_decoder(model, mesh_of(2, model.config)))
    assert_close(forward(cut, TOKENS, None), forward(FlatModel(model), TOKENS, None))


def test_each_device_has_its_part_of_planes_and_cache():
    model = model_of(WIDE)
    cut = cut_decoder(model, mesh_of(8, model.config))
    layer = cut.layers[0]
    shapes = [
        {shard.data.shape for shard in array.addressable_shards}
        for array in (layer.gate_up.planes[...], layer.down.planes[...], layer.o.scales[...])
    ]
    # Six groups among eight devices: one each, and padding alone for two. A head of 24 may lie in two groups.
    assert shapes == [{(4, 128, 256 // 16)}, {(4, 128, 64 // 16)}, {(2, 64)}]
    cache = zeros_on_mesh(lambda: KVCache.create(cut.cache_config, 2, 16, jnp.float32), cut.partition)
    assert {shard.data.shape for shard in cache.keys[0].addressable_shards} == {(2, 16, 1, 24)}


def decoded(model, steps):
    """Returns what ``decode_chunk`` generates after a prompt of two rows, greedily, with a dial."""
    flat, batch = FlatModel(model), 2
    cache = zeros_on_mesh(lambda: KVCache.create(model.cache_config, batch, 64, jnp.float32), model.partition)
    dial = Dial.create(model, TARGETS, [2.5, 5.0])
    logits, cache, preview = engine.prefill_with_preview(
        flat, TOKENS, np.array([24, 17]), cache, dial.thresholds
    )
    dial = dial.observe(preview.bits, preview.counts)
    start = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rest = Sampling.create(batch), np.full(1, -1, np.int32), np.full(batch, steps, np.int32)
    chunk, cache = engine.decode_chunk(flat, start, np.zeros(batch, bool), cache, dial, *rest, steps=steps)
    return chunk, preview, cache


@SLOW
@pytest.mark.parametrize("exchange", ["sum", "gather"])
def test_a_decode_loop_generates_the_same_tokens_with_the_same_bits(exchange):
    model = model_of(WIDE)
    expected, expected_preview, _ = decoded(model, 12)
    cut = cut_decoder(model, mesh_of(4, model.config), exchange)
    assert cut.partition.exchange == exchange
    actual, preview, cache = decoded(cut, 12)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(preview.bits, expected_preview.bits, atol=1e-4)
    np.testing.assert_allclose(actual.grading_stats.bits, expected.grading_stats.bits, atol=1e-4)
    np.testing.assert_allclose(actual.dial.excess, expected.dial.excess, atol=1e-3)
    assert "tp" in str(cache.keys[0].sharding.spec)


def test_a_checkpoint_is_loaded_in_parts_and_generates_the_same_text(graded_directory):
    config = Generator.load(graded_directory).model.config
    one, two = (Generator.load(graded_directory, mesh=make_mesh(text, config)) for text in (None, "tp=2"))
    request = Request(bits=3.0, max_tokens=24, temperature=0.0)
    texts = ["".join(generator.generate("a prompt", request)) for generator in (one, two)]
    assert texts[0] == texts[1]
    planes = two.model.layers[0].qkv.planes[...]
    assert {shard.data.nbytes for shard in planes.addressable_shards} == {planes.nbytes // 2}


@SLOW
def test_a_second_text_of_a_conversation_compiles_nothing(graded_directory, compilations):
    config = Generator.load(graded_directory).model.config
    generator, cache = Generator.load(graded_directory, mesh=make_mesh("tp=2", config)), PromptCache()
    request, texts = Request(bits=3.0, max_tokens=12, temperature=0.0), []
    for prompt in ("a first prompt", "a first prompt", "a first prompt"):
        compilations.clear()
        texts.append("".join(generator.generate(prompt, request, prompt_cache=cache)))
    assert compilations == []
    assert len(set(texts)) == 1


@SLOW
def test_an_unquantized_checkpoint_generates_the_same_text(dense_directory):
    config = Generator.load(dense_directory).model.config
    one, two = (Generator.load(dense_directory, mesh=make_mesh(text, config)) for text in (None, "tp=4"))
    request = Request(max_tokens=24, temperature=0.0)
    texts = ["".join(generator.generate("a prompt", request)) for generator in (one, two)]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def bundled():
    """Returns the bundled model on one device, and a function that returns it on several."""
    files = ModelFiles.open(BUNDLED_MODEL)

    def on(devices):
        return Generator.from_files(files, mesh=make_mesh(f"tp={devices}", files.config))

    return Generator.from_files(files), functools.cache(on)


def text_of(generator, tokens):
    return np.array(generator.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:tokens])


@SLOW
@pytest.mark.parametrize("devices", [2, 4])
def test_a_long_text_has_the_same_logits_and_levels(devices, bundled, optimized_programs):
    """512 tokens, teacher-forced: at full precision as one text, at 3 bits as windows of 16 tokens.

    Where an activation is within rounding of a threshold, a device may read another level. Every later level
    then depends on it, so windows are compared up to the first one.
    """
    one, cut = bundled[0], bundled[1](devices)
    models, tokens = [FlatModel(each.model) for each in (one, cut)], text_of(one, 512)
    full = {name: np.asarray(rows) for name, rows in one.dial("full").thresholds.by_name().items()}
    expected, actual = (recorded(model, tokens[None], full)[0] for model in models)
    assert_close(actual, expected)

    graded = {name: np.asarray(rows) for name, rows in one.dial(3.0).thresholds.by_name().items()}
    windows = tokens.reshape(32, 16)
    (expected, inputs), (actual, other_inputs) = (recorded(model, windows, graded) for model in models)
    equal_so_far = np.ones(windows.shape, bool)  # no level of an earlier layer differs up to this token
    for name in linear_names(one.model.config):
        x, other, limits = np.asarray(inputs[name]), np.asarray(other_inputs[name]), graded[name][0]
        levels, other_levels = (np.asarray(grading.levels(each, limits)) for each in (x, other))
        differing = levels != other_levels
        distance = np.abs(np.abs(x)[..., None] - limits).min(axis=-1)
        first = differing & equal_so_far[..., None]
        assert (distance[first] <= 1e-5 * np.abs(x).max()).all(), name
        equal_so_far &= ~np.maximum.accumulate(differing.any(axis=-1), axis=1)
    assert equal_so_far.mean() > 0.5
    assert_close(np.asarray(actual)[equal_so_far], np.asarray(expected)[equal_so_far])


@SLOW
@pytest.mark.parametrize(("devices", "bits", "most"), [(2, "full", 0), (4, "full", 0), (2, 3.0, 5)])
def test_twenty_prompts_get_the_same_greedy_texts(devices, bits, most, bundled, optimized_programs):
    """At 3 bits, a level that differs by rounding changes some texts (see above)."""
    one, cut = bundled[0], bundled[1](devices)
    request, different = Request(bits=bits, max_tokens=24, temperature=0.0), []
    for prompt in text_of(one, 400).reshape(20, 20).tolist():
        texts = ["".join(each.generate(prompt, request)) for each in (cut, one)]
        different += [texts] if texts[0] != texts[1] else []
    print(f"{len(different)} of 20 texts differ on {devices} devices at {bits} bits")
    assert len(different) <= most, different


class Recording(Graded):
    """Grades, and keeps the inputs of all layers, those of all devices together."""

    def __init__(self, thresholds):
        super().__init__(thresholds)
        self.inputs = {}

    def __call__(self, name, linear, x):
        whole, cut = x.array, linear.input_cut
        if cut is not None:
            parts = jax.lax.all_gather(whole, AXIS)
            spans = zip(parts, cut.offsets, cut.channels, strict=True)
            whole = jnp.concatenate([part[..., first : first + n] for part, first, n in spans], axis=-1)
        self.inputs[name] = whole
        return super().__call__(name, linear, x)


@jax.jit
@on_mesh
def recorded(model, tokens, thresholds):
    recording = Recording(thresholds)
    return model.module(tokens, recording), recording.inputs


@SLOW
def test_perplexity_and_scores_are_the_same(graded_directory):
    config = Generator.load(graded_directory).model.config
    results, scores = [], []
    for text in (None, "tp=2"):
        generator = Generator.load(graded_directory, mesh=make_mesh(text, config))
        tokens = np.random.default_rng(1).integers(0, config.vocab_size, 100)
        results.append(measure(generator.model, generator.targets, tokens, [3.0, "full"], sequence_length=40))
        scores.append(score(generator, [([5, 6, 7], [8, 9])], 3.0, max_length=32))
    for one, two in zip(*results, strict=True):
        assert two.perplexity == pytest.approx(one.perplexity, rel=1e-4)
        assert two.realised_bits == pytest.approx(one.realised_bits, abs=1e-4)
    assert scores[1][0].log_likelihood == pytest.approx(scores[0][0].log_likelihood, rel=1e-4)


@SLOW
@pytest.mark.parametrize("slots", [2, 17])
def test_an_engine_serves_the_same_answers(graded_directory, slots, compilations):
    """With 17 slots, all channels are read at one level."""
    config = Generator.load(graded_directory).model.config
    prompts, texts = ["one prompt", "another, longer prompt", "a third"], []
    for mesh in (None, "tp=2"):
        generator = Generator.load(graded_directory, mesh=make_mesh(mesh, config))
        with Engine(generator, slots=slots, max_context=128, piece=64) as served:
            compilations.clear()
            answers = served.generate_many(prompts, Request(bits=3.0, max_tokens=16, temperature=0.0))
            texts.append([answer.text for answer in answers])
            assert compilations == []
            bits = [answer.statistics().realised_bits for answer in answers]
            assert slots == 2 or bits == pytest.approx([6, 6, 6])
    assert texts[0] == texts[1]


def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers_that_do():
    config = ModelConfig.from_hf(WIDE)
    with pytest.raises(UsageError, match=r"8 query heads and 4 key heads .* 3 devices; choose 2 or 4 or 8"):
        make_mesh("tp=3", config)
    with pytest.raises(UsageError, match="tp=16: there are 8 devices"):
        make_mesh("tp=16", config)
    assert make_mesh("auto", config).size == 8
    assert make_mesh("tp=1", config) is None


@SLOW
@pytest.mark.parametrize("make", [random_model.graded, random_model.dense])
def test_random_models_of_benchmarks_run_on_a_mesh(make):
    config = ModelConfig.from_hf(WIDE)
    model = make(config, compute_dtype=jnp.float32, mesh=mesh_of(4, config))
    decoding = benchmark.DecodeRun(model, 8, 4, batch=2)
    dial = decoding.settle(random_model.TARGETS, 3.0) if model.graded else None
    chunk = decoding.run(dial)
    assert np.asarray(chunk.counts).tolist() == [4, 4]
    if dial is not None:
        assert decoding.figures(chunk)["realised_bits"] == pytest.approx(3.0, abs=0.5)
        planned = device_memory(config, 4, 8, 64)
        first = jax.devices()[0]
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(model)
            for shard in leaf.addressable_shards
            if shard.device == first
        )
        assert held == planned.weights + planned.other
    logits = benchmark.PrefillRun(model, 32).run()
    assert np.isfinite(logits).all()
