"""Sampling against a float64 oracle that follows the logits processors of transformers step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.sampling import Sampling, adjust, choose_tokens, filtered, greedy, probabilities

jit_choose_tokens = jax.jit(choose_tokens, static_argnames="policy")
jit_filtered = jax.jit(filtered, static_argnames="policy")
jit_probabilities = jax.jit(probabilities, static_argnames="policy")


def choose(logits, sampling, positions):
    return jit_choose_tokens(logits, sampling, positions, policy=policy.CPU)


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def oracle(scores, temperature, top_k, top_p, min_p):
    """Applies TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper in this order."""
    scores = scores.astype(np.float64) / temperature
    if top_k > 0:
        scores = np.where(scores < np.sort(scores)[-min(top_k, scores.size)], -np.inf, scores)
    if top_p < 1:
        order = np.argsort(scores)
        removed = np.cumsum(softmax(scores[order])) <= 1 - top_p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    if min_p > 0:
        probabilities = softmax(scores)
        scores = np.where(probabilities < min_p * probabilities.max(), -np.inf, scores)
    return scores


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 0.001, 0.0),
    (2.0, 0, 1.0, 0.1),
    (0.9, 40, 0.95, 0.05),
    (1.0, 10_000, 0.5, 1.0),
    (1.5, 1, 0.9, 0.0),
]


def rows(settings) -> Sampling:
    columns = list(zip(*settings, strict=True))
    return Sampling(
        temperature=jnp.array(columns[0], jnp.float32),
        top_k=jnp.array(columns[1], jnp.int32),
        top_p=jnp.array(columns[2], jnp.float32),
        min_p=jnp.array(columns[3], jnp.float32),
        seed=jnp.arange(len(settings), dtype=jnp.uint32),
    )


@pytest.mark.parametrize("device_policy", [policy.CPU, policy.GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_the_oracle_in_one_batch_of_different_settings(seed, device_policy):
    logits = np.random.default_rng(seed).standard_normal((len(SETTINGS), 300)).astype(np.float32) * 3
    ours = jit_filtered(jnp.asarray(logits), rows(SETTINGS), policy=device_policy)
    for row, setting in enumerate(SETTINGS):
        expected = oracle(logits[row], *setting)
        np.testing.assert_array_equal(np.isfinite(ours[row]), np.isfinite(expected), err_msg=str(setting))
        np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-5)


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = jit_filtered(logits, Sampling.create(temperature=1.0, top_k=2), policy=policy.CPU)
    assert np.isfinite(kept).tolist() == [[False, True, True, True, False]]


def test_temperature_zero_is_greedy_beside_rows_that_sample():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50)), jnp.float32)
    sampling = rows([(0.0, 3, 0.9, 0.0), (5.0, 0, 1.0, 0.0)])
    tokens = np.array([choose(logits, sampling, np.array([p, p])) for p in range(30)])
    assert set(tokens[:, 0]) == {int(jnp.argmax(logits[0]))}
    assert len(set(tokens[:, 1])) > 5


def test_greedy_chooses_the_lowest_of_equal_tokens_in_any_order():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (6, 1000)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, [700, 30, 999]] = np.inf
    logits[3, [800, 400]] = np.nan
    order = rng.permutation(1000).astype(np.int32)
    expected = [np.flatnonzero(row == np.max(row, initial=-np.inf))[:1] for row in logits]
    expected[3] = [400]
    expected = [int(tokens[0]) for tokens in expected]
    choose_greedily = jax.jit(greedy)
    assert choose_greedily(logits).tolist() == choose_greedily(logits[:, order], order).tolist() == expected


def test_frequencies_are_the_filtered_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))
    n = 4000
    sampling = Sampling.create(n, temperature=1.0, top_p=0.85)
    tokens = choose(jnp.tile(logits, (n, 1)), sampling, jnp.zeros(n, jnp.int32))
    frequency = np.bincount(np.asarray(tokens), minlength=5) / n
    # The filter keeps 0.5, 0.25 and 0.15; four standard errors of a frequency are below 0.032.
    np.testing.assert_allclose(frequency, np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9, atol=0.032)


def test_a_sampled_token_depends_on_seed_and_position_only():
    logits = jnp.zeros((3, 1000))

    def sampled(seeds, positions):
        sampling = Sampling.create(3, temperature=1.0)
        sampling = Sampling(**{**vars(sampling), "seed": jnp.array(seeds, jnp.uint32)})
        return choose(logits, sampling, jnp.array(positions)).tolist()

    first = sampled([5, 6, 5], [9, 9, 10])
    assert first == sampled([5, 6, 5], [9, 9, 10])
    assert len(set(first)) == 3
    assert sampled([6, 5, 5], [9, 10, 9]) == [first[1], first[2], first[0]]
    assert Sampling.create(2, seed=-1).seed.tolist() == [2**32 - 1, 0]


def test_a_mask_allows_tokens_of_its_row_only():
    allowed = np.random.default_rng(0).random((3, 70)) < 0.3
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.uint32)
    sampling = dataclasses.replace(Sampling.create(3, temperature=2.0), allowed=jnp.asarray(words))
    logits = jnp.zeros((3, 70))
    np.testing.assert_array_equal(np.isfinite(adjust(logits, sampling)), allowed)
    tokens = np.array([choose(logits, sampling, jnp.full(3, position)) for position in range(40)])
    for row in range(3):
        assert allowed[row, tokens[:, row]].all()
        assert len(set(tokens[:, row])) > 8
    greedy = dataclasses.replace(sampling, greedy=True)
    assert choose(logits, greedy, jnp.zeros(3, jnp.int32)).tolist() == allowed.argmax(1).tolist()


def test_logits_in_another_order_give_the_same_tokens():
    rng = np.random.default_rng(1)
    logits, order = rng.standard_normal((8, 300)).astype(np.float32), rng.permutation(300).astype(np.int32)
    back = np.argsort(order)
    expected = choose(logits, rows(SETTINGS), jnp.arange(8)).tolist()

    @jax.jit
    def choose_in_order(logits, sampling):
        return choose_tokens(
            logits,
            sampling,
            jnp.arange(8),
            policy.CPU,
            token_ids=jnp.asarray(order),
            in_order=lambda outputs: outputs[:, back],
        )

    for sampling in (rows(SETTINGS), Sampling.create(8)):
        tokens = choose_in_order(logits[:, order], sampling)
        assert tokens.tolist() == (expected if not sampling.greedy else logits.argmax(1).tolist())


def test_probabilities_are_those_of_the_oracle():
    settings = [*SETTINGS, (0.0, 3, 0.9, 0.1)]
    logits = np.random.default_rng(2).standard_normal((len(settings), 300)).astype(np.float32) * 3
    ours = np.asarray(jit_probabilities(jnp.asarray(logits), rows(settings), policy=policy.CPU))
    for row, setting in enumerate(SETTINGS):
        np.testing.assert_allclose(ours[row], softmax(oracle(logits[row], *setting)), rtol=1e-4, atol=1e-7)
    assert ours[-1].sum() == ours[-1, logits[-1].argmax()] == 1
    greedy = jit_probabilities(jnp.asarray(logits), Sampling.create(len(settings)), policy=policy.CPU)
    assert np.argwhere(np.asarray(greedy))[:, 1].tolist() == logits.argmax(1).tolist()
