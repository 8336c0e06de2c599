"""Prefill and decoding with a KV cache against forward passes of whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bits_by_hand import bits_to_read
from random_models import CONFIGS, TARGETS, TOKENS, graded_model, state_tree

from grinqh_jax.decoding import engine, policy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.thresholds import Thresholds, model_thresholds
from grinqh_jax.model import apply, decoder
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.flat_model import FlatModel

NO_STOP = jnp.array([-1])
forward = jax.jit(lambda model, tokens: model(tokens))
step = jax.jit(engine.decode_step)


@jax.jit
def graded_forward(model, tokens, thresholds):
    strategy = apply.Graded(thresholds)
    return model(tokens, strategy), strategy.stats


@pytest.fixture(scope="module")
def dense() -> Decoder:
    return Decoder.from_tree(*state_tree(CONFIGS["qwen3-tied-gqa"]), jnp.float32)


@pytest.fixture(scope="module")
def graded() -> Decoder:
    return graded_model("qwen3-tied-gqa")


def empty_cache(model: Decoder, batch: int = 2, capacity: int = 48) -> KVCache:
    return KVCache.create(model.config, batch, capacity, model.compute_dtype)


def at(model: Decoder, bits) -> Thresholds:
    return model_thresholds(model, jnp.array(TARGETS), jnp.array(bits))


def decode(
    model,
    cache,
    last,
    thresholds=None,
    limits=None,
    stop=NO_STOP,
    steps=8,
    sampling=None,
    done=None,
    device_policy=None,
):
    batch = len(last)
    return engine.decode_chunk(
        model,
        jnp.array(last),
        jnp.zeros(batch, bool) if done is None else jnp.array(done),
        cache,
        thresholds,
        sampling or Sampling.create(batch),
        stop,
        jnp.full(batch, 100) if limits is None else jnp.array(limits),
        steps=steps,
        policy=device_policy,
    )


def test_padded_buckets_equal_the_whole_sequence(dense):
    whole = forward(dense, TOKENS)
    lengths = np.array([[16, 16], [3, 8], [0, 16]])  # three buckets of two rows
    cache, read = empty_cache(dense), np.zeros(2, int)
    for bucket in lengths:
        tokens = np.zeros((2, 16), np.int32)
        for row in range(2):
            tokens[row, : bucket[row]] = TOKENS[row, read[row] : read[row] + bucket[row]]
        logits, cache = engine.prefill(dense, tokens, jnp.array(bucket), cache)
        read += bucket
        for row in np.flatnonzero(bucket):
            np.testing.assert_allclose(logits[row], whole[row, read[row] - 1], atol=2e-5)
    assert cache.lengths.tolist() == [19, 40]


def test_a_preview_counts_the_bits_that_grading_would_read(graded):
    thresholds = at(graded, [2.0, 5.0])
    expected = bits_to_read(graded, TOKENS, thresholds)
    cache, read, counts, merged = empty_cache(graded), np.zeros(2, int), [], None
    for bucket in ([32, 3], [8, 0], [0, 32]):
        tokens = np.zeros((2, 32), np.int32)
        for row in range(2):
            tokens[row, : bucket[row]] = TOKENS[row, read[row] : read[row] + bucket[row]]
        plain, _ = engine.prefill(graded, tokens, jnp.array(bucket), jax.tree.map(jnp.copy, cache))
        logits, cache, preview = engine.prefill_with_preview(
            graded, tokens, jnp.array(bucket), cache, thresholds
        )
        np.testing.assert_allclose(logits, plain, atol=1e-5)
        counts.append(preview.counts.tolist())
        for row, count in enumerate(preview.counts):
            last = read[row] + bucket[row]
            bits = preview.bits[row, :count]
            np.testing.assert_allclose(bits, expected[row, last - count : last], atol=0.05)
        read += bucket
        merged = preview if merged is None else engine.merge_previews(merged, preview)
    assert counts == [[28, 0], [8, 0], [0, 31]]  # The first four positions do not count.
    assert merged.counts.tolist() == [28, 31]
    np.testing.assert_allclose(merged.bits[0, :28], expected[0, 4:32], atol=0.05)
    np.testing.assert_allclose(merged.bits[1, :31], expected[1, 4:35], atol=0.05)


def test_a_preview_covers_the_last_tokens(graded, dense):
    tokens, thresholds = np.tile(TOKENS, (1, 2)), at(graded, [3.0, 3.0])
    cache = empty_cache(graded, capacity=80)
    _, _, preview = engine.prefill_with_preview(graded, tokens, jnp.array([80, 6]), cache, thresholds)
    assert preview.counts.tolist() == [64, 2]
    expected = bits_to_read(graded, tokens, thresholds)
    np.testing.assert_allclose(preview.bits[0], expected[0, 16:80], atol=0.05)
    np.testing.assert_allclose(preview.bits[1, :2], expected[1, 4:6], atol=0.05)
    with pytest.raises(ValueError, match="use prefill"):
        engine.prefill_with_preview(dense, tokens, jnp.array([80, 6]), empty_cache(dense), thresholds)


def test_a_prompt_fills_the_cache_in_a_longer_bucket(dense):
    tokens = np.concatenate([TOKENS, np.ones_like(TOKENS)], axis=1)  # 80 columns, room for 40
    logits, _ = engine.prefill(dense, tokens, jnp.array([40, 40]), empty_cache(dense, capacity=40))
    np.testing.assert_allclose(logits, forward(dense, TOKENS)[:, -1], atol=2e-5)


def test_decode_steps_equal_the_graded_whole_sequence(graded):
    thresholds = at(graded, [3.0, 6.0])
    whole, stats = graded_forward(graded, TOKENS[:, :12], thresholds)
    cache = empty_cache(graded)
    for position in range(12):
        logits, cache, step_stats = step(graded, TOKENS[:, position], cache, thresholds)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-4)
        for i, name in enumerate(decoder.linear_names(graded.config)):
            # A channel within rounding of its threshold may get either level.
            np.testing.assert_allclose(step_stats.bits[:, i], stats[name].bits[:, position], atol=0.05)
            max_abs = stats[name].max_abs[:, position]
            np.testing.assert_allclose(step_stats.max_abs[:, i], max_abs, rtol=1e-3)


def test_greedy_chunks_equal_greedy_forward_passes(dense):
    expected = TOKENS.copy()
    for position in range(10, 19):  # Later columns hold other tokens, which causal attention ignores.
        expected[:, position] = np.argmax(forward(dense, expected)[:, position - 1], -1)
    logits, cache = engine.prefill(dense, TOKENS[:, :16], jnp.array([10, 10]), empty_cache(dense))
    last = np.argmax(logits, -1)
    generated = [last[:, None]]
    for _ in range(2):
        chunk, cache = decode(dense, cache, last, steps=4)
        assert chunk.grading_stats is None
        assert chunk.counts.tolist() == [4, 4]
        generated.append(np.asarray(chunk.tokens))
        last = chunk.last
    assert np.concatenate(generated, 1).tolist() == expected[:, 10:19].tolist()


@pytest.mark.slow
def test_a_graded_chunk_chooses_the_token_with_the_largest_logit(graded):
    """A chunk chooses among the outputs of the vocabulary blocks, which are in another order than tokens."""
    thresholds = at(graded, [3.0, 6.0])
    _, cache = engine.prefill(graded, TOKENS[:, :9], jnp.array([9, 4]), empty_cache(graded))
    last, expected, stepped = jnp.array([1, 2]), [], jax.tree.map(jnp.copy, cache)
    for _ in range(6):
        logits, stepped, _ = step(graded, last, stepped, thresholds)
        last = jnp.asarray(np.argmax(logits, -1))
        expected.append(last.tolist())
    chunk, _ = decode(graded, cache, [1, 2], thresholds, steps=6)
    assert chunk.tokens.T.tolist() == expected


def test_rows_stop_at_stop_tokens_limits_and_the_end_of_the_cache(dense):
    prompt = TOKENS[:1, :6].repeat(4, 0)
    logits, cache = engine.prefill(dense, prompt, jnp.full(4, 6), empty_cache(dense, 4, 13))
    first = np.argmax(logits, -1)
    never = jnp.array([-1, -1])
    free, _ = decode(dense, jax.tree.map(jnp.copy, cache), first, stop=never, limits=[7, 3, 0, 100])
    assert free.counts.tolist() == [7, 3, 0, 7]  # the last row ends with the cache: 13 slots, 6 of them used
    assert free.done.all()
    sequence = free.tokens[0, :7].tolist()
    assert free.tokens[1, :3].tolist() == sequence[:3]
    stop = sequence[4]
    stopped, after = decode(dense, cache, first, stop=jnp.array([-1, stop]), done=[False, False, True, False])
    count = sequence.index(stop) + 1
    assert stopped.counts.tolist() == [count, count, 0, count]
    assert stopped.last.tolist() == [stop, stop, int(first[2]), stop]
    assert after.lengths.tolist() == [6 + count, 6 + count, 6, 6 + count]


@pytest.mark.slow
def test_a_row_decodes_the_same_alone_and_beside_finished_rows(graded):
    thresholds = at(graded, [2.0, 5.0])
    logits, cache = engine.prefill(graded, TOKENS[:, :9], jnp.array([9, 4]), empty_cache(graded))
    last = np.argmax(logits, -1)
    both, _ = decode(graded, cache, last, thresholds, limits=[2, 8])
    assert both.grading_stats.bits.shape == both.grading_stats.max_abs.shape == (8, 2, 9)
    logits, cache = engine.prefill(graded, TOKENS[1:, :9], jnp.array([4]), empty_cache(graded, 1))
    alone, _ = decode(graded, cache, last[1:], {name: t[1:] for name, t in thresholds.items()})
    assert both.counts.tolist() == [2, 8]
    assert both.tokens[1].tolist() == alone.tokens[0].tolist()
    np.testing.assert_allclose(both.grading_stats.bits[:, 1], alone.grading_stats.bits[:, 0], atol=0.05)


@pytest.mark.slow
def test_turning_any_dial_compiles_nothing(graded):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.7, "seed": 9},
        {"temperature": 1.0, "min_p": 0.2, "top_k": 3, "top_p": 0.9},
        {"temperature": 2.0},
    ]
    results, after_first = set(), None
    for bits, setting in zip((1.5, 2.0, 3.3, 4.75, 8.0), settings, strict=True):
        thresholds = at(graded, [bits])
        sampling = Sampling.create(**setting)
        _, cache = engine.prefill(graded, TOKENS[:1, :8], jnp.array([8]), empty_cache(graded, 1))
        chunk, _ = decode(graded, cache, [5], thresholds, sampling=sampling, steps=6)
        results.add((tuple(chunk.tokens[0].tolist()), float(np.asarray(chunk.grading_stats.bits).mean())))
        if len(results) == 2:  # one greedy and one sampled
            after_first = len(compiled)
    assert after_first > 0, "the listener saw no compilation at all"
    assert len(compiled) == after_first
    assert len(results) == 5  # The settings had an effect.


def test_chunks_do_not_change_what_a_seed_generates(dense):
    def run(steps: int, seed: int) -> list[int]:
        sampling = Sampling.create(temperature=1.0, seed=seed)
        _, cache = engine.prefill(dense, TOKENS[:1, :8], jnp.array([8]), empty_cache(dense, 1))
        last, tokens = jnp.array([3]), []
        while len(tokens) < 12:
            chunk, cache = decode(dense, cache, last, sampling=sampling, steps=steps)
            last, tokens = chunk.last, tokens + chunk.tokens[0].tolist()
        return tokens

    assert run(12, 1) == run(4, 1) != run(12, 2)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_policies_generate_the_same(graded, temperature):
    """Without an early exit: the same tokens, counts, grading statistics and cache."""

    def run(device_policy):
        _, cache = engine.prefill(graded, TOKENS[:, :16], jnp.array([16, 7]), empty_cache(graded))
        sampling = Sampling.create(2, temperature=temperature, top_k=50, seed=3)
        return decode(
            FlatModel(graded),
            cache,
            [1, 2],
            at(graded, [3.0, 5.0]),
            jnp.array([3, 11]),
            steps=13,
            sampling=sampling,
            device_policy=device_policy,
        )

    chunk, cache = run(policy.CPU)
    other, other_cache = run(policy.GPU)
    assert chunk.counts.tolist() == other.counts.tolist() == [3, 11]
    assert chunk.done.tolist() == other.done.tolist()
    assert cache.lengths.tolist() == other_cache.lengths.tolist()
    for row, count in enumerate([3, 11]):
        assert chunk.tokens[row, :count].tolist() == other.tokens[row, :count].tolist()
        np.testing.assert_allclose(
            chunk.grading_stats.bits[:count, row], other.grading_stats.bits[:count, row], rtol=1e-6
        )
        length = cache.lengths[row]
        for mine, theirs in zip(
            cache.keys + cache.values, other_cache.keys + other_cache.values, strict=True
        ):
            np.testing.assert_allclose(mine[row, :length], theirs[row, :length], rtol=1e-5, atol=1e-6)
