"""Perplexity and KL divergence against NumPy; graded tokens against the engine's decode steps."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES
from random_models import state_tree
from tiny_checkpoint import HF_CONFIG, QUANTIZATION, random_tree

from grinqh_jax.cli import perplexity as perplexity_command
from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.statistics import weighted_mean
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation import perplexity
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.evaluation.result import Perplexity, TokenBits, WindowSums, standard_error
from grinqh_jax.json_files import json_line
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder, linear_names

TOKENS = np.random.default_rng(3).integers(0, 40, 43).astype(np.int32)
LENGTH = 16

decode_step = jax.jit(engine.decode_step)
dense = jax.jit(lambda model, tokens: model(tokens))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def windows() -> list[np.ndarray]:
    return [TOKENS[start : start + LENGTH] for start in range(0, len(TOKENS), LENGTH)]


def decoded(model: Decoder, window: np.ndarray, dial: Dial) -> tuple[np.ndarray, np.ndarray, Dial]:
    """Decodes the tokens one by one; returns logits, bits of every linear layer, and the dial after them."""
    thresholds = dial.thresholds
    cache = KVCache.create(model.config, 1, LENGTH, model.compute_dtype)
    logits, grades = [], []
    for token in window:
        step, cache, grade = decode_step(model, jnp.array([token]), cache, thresholds)
        logits.append(np.asarray(step[0]))
        grades.append(np.asarray(grade.bits[0]))
    dial = dial.observe(np.stack(grades)[None], np.array([len(window)]))  # the next window starts from there
    return np.stack(logits), np.stack(grades), dial


def test_tokens_are_graded_as_in_decoding(tiny):
    result, full = measure(tiny.model, tiny.targets, TOKENS, [2.0, "full"], sequence_length=LENGTH)
    losses, reference_losses, kl, same, bits = [], [], [], [], []
    dial = tiny.dial(2.0)
    for window in windows():
        logits, grades, dial = decoded(tiny.model, window, dial)
        padded = np.pad(window, (0, LENGTH - len(window)))[None]  # one shape, one program
        log_p = log_softmax(logits[:-1])
        reference = log_softmax(dense(tiny.model, padded)[0, : len(window) - 1])
        losses.append(-log_p[np.arange(len(window) - 1), window[1:]])
        reference_losses.append(-reference[np.arange(len(window) - 1), window[1:]])
        kl.append((np.exp(reference) * (reference - log_p)).sum(axis=-1))
        same.append(log_p.argmax(axis=-1) == reference.argmax(axis=-1))
        bits.append(grades[:-1])  # reading the last token of a window predicts nothing
    losses, reference_losses = np.concatenate(losses), np.concatenate(reference_losses)
    assert result.tokens == len(losses) == len(TOKENS) - len(windows())
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert full.perplexity == pytest.approx(math.exp(reference_losses.mean()), rel=1e-4)
    assert result.ratio == pytest.approx(result.perplexity / full.perplexity, rel=1e-6)
    assert result.kl == pytest.approx(np.concatenate(kl).mean(), rel=1e-3, abs=1e-7)
    assert result.same_top1 == pytest.approx(np.concatenate(same).mean())
    by_linear = dict(zip(linear_names(tiny.model.config), np.concatenate(bits).T, strict=True))
    per_token = weighted_mean(tiny.model, by_linear)
    assert result.realised_bits == pytest.approx(per_token.mean(), rel=1e-5)
    assert 0 < result.realised_bits < 4
    spread = result.token_bits
    assert (spread.mean, spread.deviation) == pytest.approx((per_token.mean(), per_token.std()), rel=1e-4)
    assert spread.percentiles == pytest.approx(
        {str(p): np.percentile(per_token, p) for p in (5, 25, 50, 75, 95)}, rel=1e-4
    )
    assert spread.loss_correlation == pytest.approx(
        np.corrcoef(per_token, reference_losses)[0, 1], rel=1e-3, abs=1e-5
    )
    layers = {name: bits for name, bits in by_linear.items() if not in_head(name)}
    layers = weighted_mean(tiny.model, layers).mean()
    assert result.realised_bits_without_head == pytest.approx(layers, rel=1e-5)
    assert abs(layers - per_token.mean()) > 1e-3
    assert full.token_bits is None
    assert (full.kl, full.same_top1, full.ratio, full.realised_bits) == (pytest.approx(0, abs=1e-6), 1, 1, 4)


@pytest.mark.slow
def test_bits_without_the_head_exclude_all_vocabulary_blocks():
    hf_config = HF_CONFIG | {"vocab_size": 1100}
    model = Decoder.from_tree(ModelConfig.from_hf(hf_config), random_tree(hf_config), jnp.float32)
    names, window = linear_names(model.config), TOKENS[:LENGTH]
    assert sum(map(in_head, names)) == 2
    (result,) = measure(model, QUANTIZATION.targets, window, [2.0], sequence_length=LENGTH)
    _, bits, _ = decoded(model, window, Dial.create(model, QUANTIZATION.targets, [2.0]))
    by_linear = dict(zip(names, bits[:-1].T, strict=True))
    layers = weighted_mean(model, {name: read for name, read in by_linear.items() if not in_head(name)})
    assert result.realised_bits_without_head == pytest.approx(layers.mean(), rel=1e-5)


def test_all_settings_of_the_dial_share_one_compiled_program(tiny):
    perplexity._graded_logits.clear_cache()
    measure(tiny.model, tiny.targets, TOKENS, [1.0, 1.5, 2.0, 3.3, 4.0], sequence_length=LENGTH)
    assert perplexity._graded_logits._cache_size() == 1


def test_windows_are_read_in_order_and_reported(tiny):
    progress = []
    (first,) = measure(tiny.model, tiny.targets, TOKENS[:LENGTH], [2.0], sequence_length=LENGTH)
    (result,) = measure(
        tiny.model, tiny.targets, TOKENS, [2.0], sequence_length=LENGTH, on_progress=progress.append
    )
    assert progress == [len(window) for window in windows()]
    assert result.windows.tokens.tolist() == [len(window) - 1 for window in windows()]
    assert result.windows.loss[0] == pytest.approx(first.windows.loss[0], rel=1e-5)


def test_standard_error_treats_windows_as_independent():
    rng = np.random.default_rng(0)
    counts = rng.integers(3, 9, 20_000).astype(np.float64)
    level = rng.normal(2.0, 0.5, counts.shape)  # the tokens of a window share it, so they are not independent
    texts = [slice(start, start + 40) for start in range(0, len(counts), 40)]
    means = [(level[t] * counts[t]).sum() / counts[t].sum() for t in texts]
    estimates = [standard_error(level[t] * counts[t], counts[t]) for t in texts]
    assert np.mean(estimates) == pytest.approx(np.std(means), rel=0.1)
    assert standard_error(np.ones(1), np.ones(1)) is None


def test_standard_errors_of_differences_are_paired():
    """The difficulty of a text is common to model and reference, so it does not widen their difference."""
    rng = np.random.default_rng(1)

    def draw():
        tokens = rng.integers(50, 90, 400).astype(np.float64)
        reference = tokens * rng.normal(3.0, 0.3, tokens.shape)
        loss = reference + tokens * rng.normal(0.05, 0.02, tokens.shape)
        kl, same = tokens * rng.exponential(0.1, tokens.shape), tokens * rng.uniform(0.6, 1.0, tokens.shape)
        return Perplexity.of(2.0, WindowSums(loss, reference, kl, same, tokens * 2, tokens * 2, tokens), None)

    draws = [draw() for _ in range(300)]
    for value, error in (
        ("perplexity", "stderr"),
        ("difference", "difference_stderr"),
        ("ratio", "ratio_stderr"),
        ("kl", "kl_stderr"),
        ("same_top1", "same_top1_stderr"),
    ):
        spread = np.std([getattr(draw, value) for draw in draws])
        assert np.mean([getattr(draw, error) for draw in draws]) == pytest.approx(spread, rel=0.12), value
    assert draws[0].difference == pytest.approx(draws[0].perplexity * (1 - 1 / draws[0].ratio))
    assert draws[0].difference_stderr < 0.2 * draws[0].stderr


def test_figures_that_overflow_are_infinite_and_valid_json():
    """exp(710) is larger than the largest float64."""
    count = np.array([3.0, 4.0])
    sums = WindowSums(
        loss=count * 1000,
        reference_loss=count,
        kl=count * 999,
        same_top1=0 * count,
        bits=count,
        bits_without_head=count,
        tokens=count,
    )
    result = Perplexity.of(2.0, sums, TokenBits.of(np.ones(7), np.full(7, np.inf)))
    assert (result.perplexity, result.ratio, result.difference) == (math.inf,) * 3
    assert result.kl == 999
    as_json = json_line(result.to_json())
    found = json.loads(as_json, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["perplexity"] == found["ratio"] == "Infinity"
    assert found["ratio_stderr"] == "NaN"
    assert float(found["perplexity"]) == math.inf
    assert "inf" in result.cells()["perplexity"]


def test_token_bits_report_their_spread_and_correlation_with_the_loss():
    losses = np.linspace(0, 5, 101)
    spread = TokenBits.of(2 + losses / 5, losses)
    assert spread.loss_correlation == pytest.approx(1)
    assert spread.percentiles == pytest.approx({"5": 2.05, "25": 2.25, "50": 2.5, "75": 2.75, "95": 2.95})
    assert "95 % 2.950" in spread.line()
    assert "correlation with the loss +1.00" in spread.line()
    assert TokenBits.of(np.full(101, 2.0), losses).loss_correlation is None


def test_a_model_is_its_own_default_reference(tiny):
    tokens = TOKENS[:LENGTH]
    (own,) = measure(tiny.model, tiny.targets, tokens, [2.0], sequence_length=LENGTH)
    (same,) = measure(tiny.model, tiny.targets, tokens, [2.0], sequence_length=LENGTH, reference=tiny.model)
    assert same == own
    assert own.stderr is None  # a single window


@pytest.mark.slow
def test_windows_beyond_the_original_context_of_longrope():
    """The first two windows have the long factors, the last one, which is shorter, the short ones."""
    config, tree = state_tree(CASES["phi3-longrope"])
    model = Decoder.from_tree(config, jax.tree.map(jnp.asarray, tree), jnp.float32)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, 240).astype(np.int32)
    [result] = measure(model, None, tokens, ["full"], sequence_length=100)
    long = {"short_factor": CASES["phi3-longrope"]["rope_parameters"]["long_factor"]}
    ropes = CASES["phi3-longrope"]["rope_parameters"] | long | {"attention_factor": attention_factor(config)}
    options = {"rope_parameters": ropes, "original_max_position_embeddings": 128}
    other = ModelConfig.from_hf(CASES["phi3-longrope"] | options)
    always_long = Decoder.from_tree(other, jax.tree.map(jnp.asarray, tree), jnp.float32)
    losses = []
    for one, start, stop in ((always_long, 0, 100), (always_long, 100, 200), (model, 200, 240)):
        log_p = log_softmax(dense(one, tokens[None, start:stop])[0, :-1])
        losses.append(-np.take_along_axis(log_p, tokens[start + 1 : stop, None], axis=-1))
    assert result.perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-5)


def attention_factor(config: ModelConfig) -> float:
    return config.layers[0].attention.rope.attention_factor


def test_invalid_measurements_are_refused(tiny):
    for tokens, length, bits, message in (
        (TOKENS[:1], 8, "full", "1 tokens"),
        (TOKENS, 1, "full", "sequence length 1"),
        (TOKENS, 65, "full", "sequence length 65: the context of the model has 64 tokens"),
        (TOKENS + 40, 8, "full", "is outside the model's vocabulary of 48"),
        (TOKENS, 8, 9.0, "bits 9: this checkpoint's dial goes from 1 to 4"),
        (TOKENS, 8, float("nan"), "bits nan"),
    ):
        with pytest.raises(UsageError, match=message):
            measure(tiny.model, tiny.targets, tokens, [bits], sequence_length=length)
    with pytest.raises(UsageError, match="bits 3: the model is not quantized"):
        measure(tiny.model, None, TOKENS, ["full", 3.0], sequence_length=8)


def test_command_prints_one_json_object_or_table_row_per_setting(tiny_directory, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some text to read. "}\n{"question": "how many 5", "answer": "#### 5"}\n' * 3)
    flags = ["--model", str(tiny_directory), "--data", str(data), "--sequence-length", "32"]
    assert perplexity_command.main([*flags, "--bits", "1.5,full", "--tokens", "70", "--json"]) == 0
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["bits"] for result in results] == [1.5, "full"]
    assert all(result["tokens"] == 67 and result["stderr"] > 0 for result in results)
    assert results[0]["token_bits"]["percentiles"].keys() == {"5", "25", "50", "75", "95"}
    assert "windows" not in results[0]
    assert captured.err == ""  # no progress bar, as stderr is not a terminal
    assert perplexity_command.main([*flags, "--bits", "2,full"]) == 0
    compared, *table = capsys.readouterr().out.splitlines()
    assert compared.startswith("compared with this checkpoint's own 4 bits")
    assert table[0].split()[:4] == ["bits", "bits", "read", "perplexity"]
    assert [line.split()[0] for line in table[1:3]] == ["2", "full"]
    assert re.fullmatch(r"--bits 2: bits per token: mean .* 5 % .*", table[3])
    assert len(table) == 4


def test_command_refuses_bad_input_in_one_line(tiny_directory, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": 1}\n[\n')
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.touch()
    binary.write_bytes(b"ok \xff")
    model = ["--model", str(tiny_directory)]
    for arguments, message in (
        ([*model, "--data", str(bad)], "line 2, 3: expected a JSON object with"),
        ([*model, "--data", str(empty)], "holds no text"),
        ([*model, "--data", str(binary)], "is not UTF-8: byte 0x"),
        ([*model, "--data", str(tmp_path / "none.txt")], "No such file"),
        ([*model, "--data", str(bad), "--bits", "0.5,2,0.7"], "bits 0.5, 0.7: "),
        (["--model", str(tmp_path / "none"), "--data", str(bad)], "none"),
    ):
        assert perplexity_command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error


@pytest.mark.slow
def test_perplexity_of_an_unquantized_model(shared, capsys):
    """The expected figure was computed without this library, with NumPy and PyTorch."""
    model = str(shared / "models" / "qwen3-32m")
    flags = [
        "--data",
        str(shared / "data" / "books_test.txt"),
        "--tokens",
        "2048",
        "--sequence-length",
        "512",
    ]
    assert perplexity_command.main(["--model", model, *flags, "--json"]) == 0
    (result,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert result["bits"] == "full"
    assert result["perplexity"] == pytest.approx(41.46, abs=0.02)
