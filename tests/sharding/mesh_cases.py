"""Models on 2, 4 and 8 devices give the answers of one device. ``test_mesh`` runs this file in a process.

The process has eight CPU devices. Tiny models run in the default tests, those of all families in the slow
ones.
"""

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_models import SLOW, TOKENS, WIDE, assert_close, assert_same_answers, forward, mesh_of, model_of
from random_models import TARGETS

from grinqh_jax.benchmarking import measure as benchmark
from grinqh_jax.benchmarking import random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.cli import benchmark as benchmark_verb
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.load_speculation import speculation_of
from grinqh_jax.decoding.prompt_cache import PromptCache
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.evaluation.scoring import score
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.serving.engine import Engine
from grinqh_jax.sharding.cutting import cut_decoder
from grinqh_jax.sharding.memory import device_memory
from grinqh_jax.sharding.mesh import make_mesh
from grinqh_jax.sharding.program import zeros_on_mesh
from pallas_kernels.layout import DIGIT_BITS


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 8])
def test_a_cut_model_gives_the_same_logits_and_statistics(devices):
    assert_same_answers(model_of(WIDE), devices)


# On four devices some share a key head, on two none does, which is the same for all families but hybrid ones.
ON_TWO = [name for name in family_cases.CASES if ModelConfig.from_hf(family_cases.CASES[name]).delta_heads]
ON_TWO += ["qwen2-moe", "gemma3"]


@SLOW
@pytest.mark.parametrize(
    ("name", "devices"), [(name, 4) for name in family_cases.CASES] + [(name, 2) for name in ON_TWO]
)
def test_every_family_gives_the_same_logits_and_statistics(name, devices):
    config = ModelConfig.from_hf(family_cases.CASES[name])
    delta = config.delta_heads
    if delta is not None and delta.value_heads % devices:
        with pytest.raises(UsageError, match=r"value heads of gated delta nets and \d key heads cannot be"):
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
def test_a_decode_loop_generates_the_same_tokens_with_the_same_bits():
    model = model_of(WIDE)
    expected, expected_preview, _ = decoded(model, 12)
    cut = cut_decoder(model, mesh_of(4, model.config))
    assert cut.partition.exchange == "sum"  # The kernel needs GPUs.
    actual, preview, cache = decoded(cut, 12)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(preview.bits, expected_preview.bits, atol=1e-4)
    np.testing.assert_allclose(actual.grading_stats.bits, expected.grading_stats.bits, atol=1e-4)
    np.testing.assert_allclose(actual.dial.excess, expected.dial.excess, atol=1e-3)
    assert "tp" in str(cache.keys[0].sharding.spec)


def test_benchmark_says_how_decode_steps_exchange(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_verb, "rows", lambda *_: [])
    monkeypatch.setattr(benchmark_verb.measure, "read_bandwidth", lambda: 1e9)
    assert benchmark_verb.main(["--mesh", "tp=2"]) == 0
    assert 'exchange of decode steps: sum, because "kernel" needs ' in capsys.readouterr().err


@SLOW
@pytest.mark.parametrize("devices", [2, 4])
def test_gated_delta_nets_decode_with_a_state_on_each_device(devices):
    """Of four devices, two share a key head. Each has the convolution and the memory of its heads."""
    model = model_of(family_cases.CASES["qwen3_5"] | {"linear_num_value_heads": 4})
    expected, expected_preview, _ = decoded(model, 12)
    actual, preview, cache = decoded(cut_decoder(model, mesh_of(devices, model.config)), 12)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(preview.bits, expected_preview.bits, atol=1e-4)
    # Devices add in another order, which may move a channel over a threshold: rarely, one of a layer's 64.
    differences = np.abs(actual.grading_stats.bits - expected.grading_stats.bits)
    assert differences.max() <= DIGIT_BITS / 64 + 1e-4
    assert np.mean(differences > 1e-4) <= 0.01
    shapes = [{shard.data.shape[1:] for shard in leaf.addressable_shards} for leaf in cache.fixed[0][:2]]
    assert shapes == [{(3, 2 * 16 * max(2 // devices, 1) + 24 * 4 // devices)}, {(4 // devices, 16, 24)}]


def test_a_checkpoint_is_loaded_in_parts_and_generates_the_same_text(chat_directory):
    config = Generator.load(chat_directory).model.config
    one, two = (Generator.load(chat_directory, mesh=make_mesh(text, config)) for text in (None, "tp=2"))
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
        with Engine(generator, slots=slots, max_context=128, prefill_chunk=64) as served:
            compilations.clear()
            answers = served.generate_many(prompts, Request(bits=3.0, max_tokens=16, temperature=0.0))
            texts.append([answer.text for answer in answers])
            assert compilations == []
            bits = [answer.statistics().realised_bits for answer in answers]
            assert slots == 2 or bits == pytest.approx([6, 6, 6])
    assert texts[0] == texts[1]


@SLOW
@pytest.mark.parametrize("drafter", ["lookup", "self", "model"])
def test_texts_with_drafts_are_those_without(graded_directory, drafter):
    config = Generator.load(graded_directory).model.config
    generator = Generator.load(graded_directory, mesh=make_mesh("tp=2", config))
    generator.holds_dial = True
    request = Request(bits="full", max_tokens=40, temperature=0.0)
    text = str(graded_directory) if drafter == "model" else drafter
    speculation = speculation_of(SpeculationSetting.parse(text), generator)
    always = Speculation(speculation.drafter, always=True)
    for prompt in ("the cat and the cat sat on", "to be or not to be, to be or"):
        texts = [generator.generate(prompt, request, speculation=of) for of in (None, always)]
        plain, drafted = ("".join(text) for text in texts)
        assert drafted == plain
        assert texts[1].tokens == texts[0].tokens
        assert texts[1].statistics().speculation.accepted > 0


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
    decoding = DecodeRun(model, 8, 4, batch=2)
    dial = decoding.settle(random_model.TARGETS, 3.0) if model.graded else None
    decoded = decoding.run(dial)
    assert decoded.tokens.shape == (2, 4)
    if dial is not None:
        assert decoding.figures(decoded)["realised_bits"] == pytest.approx(3.0, abs=0.5)
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
