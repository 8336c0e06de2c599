"""The library's ``Generator``, with a tiny model that writes bytes."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from batch import Batch
from bits_by_hand import bits_to_read
from random_models import CONFIGS, state_tree

from grinqh_jax.decoding.dial import PRIOR_TOKENS, layer_shares
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.statistics import Statistics, grading_fields
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.evaluation.completion import complete
from grinqh_jax.evaluation.scoring import score
from grinqh_jax.model.decoder import Decoder, linear_names, linear_shapes

PROMPT = "Grüße"


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


def finished(generator, prompt=PROMPT, max_context=None, **request):
    generation = generator.generate(prompt, Request(**request), max_context=max_context)
    pieces = list(generation)
    assert "".join(pieces) == generation.text
    return generation


def without_end(generator) -> Generator:
    """The generator with end tokens that no text has; as many as usual, for the same programs."""
    return with_defaults(generator, eos_tokens=(-1, -1))


def with_defaults(generator, **defaults) -> Generator:
    """The generator with other special tokens."""
    g = generator
    return Generator(g.model, g.tokenizer, GenerationConfig(**defaults), g.targets, g.directory)


def test_streamed_text_equals_the_decoded_tokens(generator):
    for seed in range(4):
        generation = finished(generator, temperature=1.5, seed=seed, max_tokens=60)
        assert generation.text == generator.tokenizer.decode(generation.tokens)
        assert generation.finish_reason == ("length" if len(generation.tokens) == 60 else "stop")


def test_same_seed_same_text(generator):
    first, again, other = (finished(generator, temperature=1.0, seed=s).tokens for s in (5, 5, 6))
    assert first == again != other
    assert (
        finished(generator).tokens == finished(generator, seed=9).tokens
    )  # A greedy text does not depend on the seed.


def test_every_eos_token_ends_the_text(generator):
    free = finished(without_end(generator), max_tokens=40).tokens
    end = free[20]
    stopped = finished(with_defaults(generator, eos_tokens=(257, end)), max_tokens=40)
    assert stopped.tokens == free[: free.index(end) + 1]
    assert stopped.finish_reason == "stop"


def test_a_request_has_its_own_stop_tokens_and_biases(generator):
    ended = finished(generator, max_tokens=6, logit_bias={0: 100.0})
    assert ended.tokens == [0]
    assert ended.finish_reason == "stop"
    # Two stop tokens, as usual, for the same programs.
    endless = finished(generator, max_tokens=6, logit_bias={0: 100.0}, stop_tokens=(1, 257))
    assert endless.tokens == [0] * 6
    free = finished(generator, max_tokens=6).tokens
    stopped = finished(generator, max_tokens=6, stop_tokens=[free[3], 257])
    assert stopped.tokens == free[: free.index(free[3]) + 1]
    assert free[0] not in finished(generator, max_tokens=6, logit_bias={free[0]: -100.0}).tokens
    with pytest.raises(UsageError, match="token 258 is outside"):
        generator.generate(PROMPT, Request(stop_tokens=[258]))


def test_a_stop_string_cuts_the_text(generator):
    generator = without_end(generator)
    free = finished(generator, temperature=1.0, max_tokens=60).text
    stop = free[25:28]
    for given in (["never!", stop], stop):
        stopped = finished(generator, temperature=1.0, max_tokens=60, stop=given)
        assert stopped.text == free[: free.index(stop)]
        assert stopped.finish_reason == "stop"


def test_a_generation_is_iterated_over_once(generator):
    generation = finished(generator, max_tokens=8)
    text = generation.text
    with pytest.raises(UsageError, match="iterated over once"):
        next(iter(generation))
    assert generation.text == text


@pytest.mark.parametrize("token", [10**6, -5, 258])
def test_tokens_outside_the_vocabulary_are_refused(generator, token):
    message = f"token {token} is outside the model's vocabulary of 258"
    with pytest.raises(UsageError, match=message):
        generator.generate([5, token])
    with pytest.raises(UsageError, match=message):
        score(generator, [([5, 6], [7]), ([5, token], [7])], "full", max_length=16)
    with pytest.raises(UsageError, match=message):
        complete(generator, [[5], [token]], "full", max_tokens=2, batch=2, ended=lambda text: False)


def test_the_context_ends_the_text_and_refuses_a_long_prompt(generator):
    generator = without_end(generator)
    prompt = "x" * 110  # in the usual context, for the same programs
    generation = finished(generator, prompt, max_context=128, max_tokens=500)
    assert len(generation.tokens) == 128 - 110
    assert generation.finish_reason == "length"
    with pytest.raises(UsageError, match="the prompt has 30 tokens and the context holds 20"):
        generator.generate("x" * 30, max_context=20)
    with pytest.raises(UsageError, match="a context of 129 tokens: the model has positions for 2 to 128"):
        generator.generate("x", max_context=129)


def test_an_empty_prompt_is_replaced_by_a_special_token(generator):
    with_bos = with_defaults(generator, bos_token=65, eos_tokens=(0, 1))
    assert finished(with_bos, "", max_tokens=5).tokens == finished(with_bos, [65], max_tokens=5).tokens
    assert finished(generator, "", max_tokens=5).tokens == finished(generator, [0], max_tokens=5).tokens
    with pytest.raises(UsageError, match="prompt is empty"):
        with_defaults(generator).generate("")


@pytest.mark.parametrize("bits", [0.5, 8.1, float("nan")])
def test_bits_out_of_range_are_refused(generator, bits):
    with pytest.raises(UsageError, match="dial goes from 1 to 8"):
        generator.generate(PROMPT, Request(bits=bits))


def test_all_bad_values_of_a_request_are_named():
    with pytest.raises(UsageError) as caught:
        Request(
            max_tokens=0, temperature=-1, top_k=-2, top_p=0, min_p=2, stop=[""], logit_bias={5: 101, 6: 1}
        )
    named = "max_tokens is 0", "temperature is -1", "top_k is -2", "top_p is 0", "min_p is 2", "stop"
    for text in (*named, "the logit bias of token 5 is 101, expected -100 to 100"):
        assert text in str(caught.value)


def test_an_unquantized_model_runs_at_full_precision_only(one_layer_dense_directory, generator):
    dense = Generator.load(one_layer_dense_directory)
    generation = finished(dense, bits="full", max_tokens=8)
    statistics = generation.statistics()
    assert generation.bits is None
    assert statistics.realised_bits is statistics.realised_bits_per_step is None
    assert statistics.bytes_per_token > 1.9 * statistics.bytes_per_token_bf16  # float32 kernels on a CPU
    with pytest.raises(UsageError, match=r"bits 3: .*not quantized"):
        dense.generate(PROMPT, Request(bits=3.0))
    # Eight bits are close enough to full precision for the same first greedy tokens.
    assert generation.tokens[:3] == finished(generator, bits="full", max_tokens=3).tokens


def test_an_unquantized_model_may_have_a_large_vocabulary():
    """A graded model would have several vocabulary blocks, a dense one has one."""

    def bytes_per_token(vocabulary: int) -> float:
        config, tree = state_tree(CONFIGS["qwen3-tied-gqa"] | {"vocab_size": vocabulary})
        return grading_fields(Decoder.from_tree(config, tree, jnp.float32), None)["bytes_per_token"]

    hidden, float32_bytes = CONFIGS["qwen3-tied-gqa"]["hidden_size"], 4
    assert bytes_per_token(1100) - bytes_per_token(96) == (1100 - 96) * hidden * float32_bytes


def test_a_config_that_is_null_or_has_a_null_quantization(one_layer_dense_directory, tmp_path):
    for path in one_layer_dense_directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config, text = tmp_path / "config.json", (one_layer_dense_directory / "config.json").read_text()
    config.unlink()
    config.write_text("null")
    with pytest.raises(CheckpointError, match=r"config\.json holds NoneType, expected an object"):
        Generator.load(tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"quantization_config": None}))
    assert Generator.load(tmp_path).targets is None


def test_statistics_sum_up_what_the_steps_read(generator):
    generator = without_end(generator)
    generation = finished(generator, bits=4.5, max_tokens=21)
    statistics, stats = generation.statistics(), generation.grading_stats
    names = linear_names(generator.model.config)
    assert stats.bits.shape == stats.max_abs.shape == (20, len(names))
    sizes = [k * n for k, n in linear_shapes(generator.model.config).values()]
    expected = np.average(stats.bits.mean(0), weights=sizes)
    assert statistics.realised_bits == pytest.approx(expected)
    assert 1 < expected < 8
    assert list(statistics.realised_bits_per_layer) == names
    small = 2 * (64 * 3 + 2 * 32 + 64)  # bf16 norms of a layer and the output, and one row of the embedding
    assert statistics.bytes_per_token == pytest.approx(sum(sizes) * (expected + 0.125) / 8 + small)
    assert statistics.bytes_per_token_bf16 == sum(sizes) * 2 + small
    assert (statistics.prompt_tokens, statistics.generated_tokens) == (7, 21)
    assert statistics.generation_tokens_per_second > 0
    assert statistics.peak_memory_bytes > 1e6
    for i, name in enumerate(names):
        largest = stats.max_abs[:, i].max() / float(generator.model.linear(name).max_activation[...])
        assert statistics.activation_range_ratio[name] == pytest.approx(largest)
    full = finished(generator, bits="full", max_tokens=4).statistics()
    assert full.realised_bits == 8


def test_warning_when_activations_leave_the_calibrated_range():
    def warning(**activation_range_ratio):
        fields = dict.fromkeys((f.name for f in dataclasses.fields(Statistics)), 0)
        fields |= {"realised_bits_per_layer": {}, "realised_bits_per_step": None, "dense_dtype": None}
        fields |= {"speculation": None, "reading": "graded"}
        return Statistics(**fields | {"activation_range_ratio": activation_range_ratio}).warning()

    assert warning(a=0.9, b=1.5) is None
    assert "in 2 of 3 linear layers (up to 40 times the largest in calibration, in c)" in warning(
        a=1.0, b=1.6, c=40.0
    )
    assert "1 of 2" in warning(a=float("nan"), b=1.0)


def test_new_settings_compile_nothing(generator, compilations):
    finished(generator, max_tokens=20)
    finished(generator, max_tokens=20, temperature=1.0)  # Sampling has other programs than greedy decoding.
    before = len(compilations)
    for i, bits in enumerate((1.0, 2.0, 3.3, 5.75, "full")):
        finished(generator, "x" * (i + 1), bits=bits, max_tokens=18 + i)
        finished(generator, bits=bits, temperature=i / 2, top_k=i, top_p=1 - i / 8, min_p=i / 10, seed=i)
    assert len(compilations) == before


@pytest.mark.slow
def test_preparing_compiles_everything(generator, compilations):
    prompts = [range(2, 50), range(2, 9), range(40, 43)]  # a batch size that no other test has
    batch = Batch(generator, prompts, bits=3.0, max_tokens=20, max_context=128, temperature=1.0)
    batch.compile([32, 64])
    prepared = len(compilations)
    assert prepared >= 5
    assert [len(tokens) for tokens in batch.run()] == [20] * 3
    assert len(compilations) == prepared


def test_the_dial_observes_the_preview_of_the_prompt(generator):
    prompts = [list(range(2, 62)), [5, 6, 7]]
    batch = Batch(generator, prompts, bits=3.0, max_tokens=1, max_context=128)
    batch.prefill()
    read = bits_to_read(generator.model, np.array(prompts[:1]), generator.dial(3.0).thresholds)[0, 4:]
    excess = (read @ layer_shares(generator.model.config)).mean() - 3
    assert abs(excess) > 0.01
    expected = 3 - excess * 56 / (56 + PRIOR_TOKENS)
    # All three tokens of the second prompt are in skipped positions.
    dial = generator.dial(3.0).with_state(batch.dial_state)
    np.testing.assert_allclose(dial.setting, [expected, 3], atol=0.01)


@pytest.mark.slow
def test_a_batch_generates_what_its_rows_generate_alone(generator, monkeypatch):
    monkeypatch.setattr(
        "grinqh_jax.decoding.prefill_buckets.LARGEST_BUCKET", 32
    )  # The longest prompt needs three.
    prompts = [list(range(2, 90)), [5, 6, 7], list(range(100, 140))]

    def run(rows: list[int]) -> list[list[int]]:
        some = [prompts[row] for row in rows]
        return Batch(generator, some, bits=6.0, max_tokens=12, max_context=128).run()

    together = run([0, 1, 2])
    assert together == [run([row])[0] for row in range(3)]
    assert [len(tokens) for tokens in together] == [12, 12, 12]
