"""The rejection rule: new tokens have the distribution of the target, for single tokens and short texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.sampling import Sampling, sample
from grinqh_jax.decoding.speculation.acceptance import DRAFTING, by_match, by_rejection, random_keys
from grinqh_jax.decoding.speculation.drafter import Draft

RUNS = 20_000
VOCABULARY = 5


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic over its degrees of freedom, which is about 1 for samples of these probabilities."""
    expected = probabilities * counts.sum()
    usual = expected > 5
    return float((((counts - expected) ** 2)[usual] / expected[usual]).sum() / max(usual.sum() - 1, 1))


def distributions(seed: int, *shape: int) -> jax.Array:
    logits = np.random.default_rng(seed).normal(size=(*shape, VOCABULARY)) * 1.5
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))


@functools.partial(jax.jit, static_argnames=("rejection", "runs"))
def texts(target, draft, rejection, runs=RUNS):
    """Decodes texts of two tokens of a Markov chain, with two drafts a step.

    Args:
      target, draft: Log-probabilities ``[V + 1, V]`` after each token, and after the beginning (row V).
      rejection: Whether to accept by rejection and not by match.

    Returns:
      int32 ``[runs, 2]``, the first two tokens of each text, and the accepted drafts of its first step.
    """
    sampling = Sampling.create(runs, temperature=1.0)

    def step(last, first_position):
        """Returns up to three new tokens, and their number."""
        positions = first_position[:, None] + jnp.arange(3)
        keys = random_keys(sampling, positions[:, :2], DRAFTING)
        tokens, token = [], last
        for i in range(2):
            noise = jax.vmap(lambda key: jax.random.gumbel(key, (VOCABULARY,)))(keys[:, i])
            token = jnp.argmax(draft[token] + noise, axis=-1)
            tokens.append(token)
        tokens = jnp.stack(tokens, axis=1)
        before = jnp.concatenate([last[:, None], tokens], axis=1)
        logits = target[before]
        rows = jax.tree.map(lambda row: jnp.repeat(row, 3, axis=0), sampling)
        chosen = sample(logits.reshape(-1, VOCABULARY), rows, positions.reshape(-1), policy.CPU).reshape(
            runs, 3
        )
        drafts = Draft(tokens, jnp.full(runs, 2), jnp.exp(draft[before[:, :2]]))
        if rejection:
            new, accepted = by_rejection(chosen, drafts, jnp.exp(logits), sampling, positions)
        else:
            new, accepted = by_match(chosen, drafts)
        return new, accepted

    start = jnp.full(runs, VOCABULARY)
    new, accepted = step(start, jnp.zeros(runs, jnp.int32))
    more, _ = step(new[:, 0], jnp.ones(runs, jnp.int32))
    second = jnp.where(accepted > 0, new[:, 1], more[:, 0])
    return jnp.stack([new[:, 0], second], axis=1), accepted


@pytest.mark.parametrize("rejection", [True, False], ids=["rejection", "match"])
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_have_the_distribution_of_the_target(rejection, seed):
    target, draft = distributions(seed, VOCABULARY + 1), distributions(seed + 10, VOCABULARY + 1)
    pairs, accepted = (np.asarray(array) for array in texts(target, draft, rejection))
    first = np.exp(target[VOCABULARY])
    both = first[:, None] * np.exp(target[:VOCABULARY])
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, tuple(pairs.T), 1)
    assert chi_square(counts.sum(axis=1), first) < 3
    assert chi_square(counts.ravel(), both.ravel()) < 2
    # The test has the power to reject the distribution of the drafts.
    wrong = np.exp(draft[VOCABULARY])[:, None] * np.exp(draft[:VOCABULARY])
    assert chi_square(counts.ravel(), wrong.ravel()) > 20
    if rejection:  # The rate of the first draft is the overlap of both distributions (arXiv 2211.17192).
        overlap = np.minimum(first, np.exp(draft[VOCABULARY])).sum()
        assert abs((accepted > 0).mean() - overlap) < 0.015


def test_drafts_of_the_target_are_all_accepted():
    target = distributions(3, VOCABULARY + 1)
    _, accepted = texts(target, target, True)
    assert accepted.min() == 2


def test_a_text_of_temperature_zero_accepts_by_match():
    chosen = jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drafts = jnp.array([[1, 2], [1, 0], [1, 2]])
    draft = Draft(drafts, jnp.array([2, 2, 1]), jnp.ones((3, 2, VOCABULARY)) / VOCABULARY)
    sampling, positions = Sampling.create(3), jnp.zeros((3, 3), jnp.int32)
    probabilities = jnp.ones((3, 3, VOCABULARY)) / VOCABULARY
    tokens, accepted = by_rejection(chosen, draft, probabilities, sampling, positions)
    assert accepted.tolist() == [2, 1, 1]
    assert tokens.tolist() == chosen.tolist()
