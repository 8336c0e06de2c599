"""Texts with speculation are the texts without, whatever the drafts are."""

import dataclasses

import numpy as np
import pytest
from batch import Batch
from drafters import KnownTexts

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.speculation.block_dial import BLOCK
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.speculation import Speculation

PROMPTS = [list(b"the cat and the cat sat on"), list(b"aabab"), list(b"to be or not to be, to be or")]
CONTEXT = 160  # as in test_texts.py, for the same programs
SHORT = dataclasses.replace(policy.CPU, chunk_steps=8)


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


@pytest.fixture
def held(generator, monkeypatch):
    """The generator with a dial that keeps its setting."""
    monkeypatch.setattr(generator, "holds_dial", True)
    return generator


def run(generator, prompts=PROMPTS, **options) -> Batch:
    defaults = {"bits": 3.0, "max_tokens": 40, "max_context": CONTEXT, "policy": SHORT, "stop_tokens": (-1,)}
    batch = Batch(generator, prompts, **defaults | options)
    batch.run()
    return batch


def known(plain: Batch, prompts=PROMPTS, **options) -> Speculation:
    """Speculation that drafts the texts of another run, with errors."""
    texts = [prompt + tokens for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    return Speculation(KnownTexts.of(texts, CONTEXT, **options), always=True)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.tokens == other.tokens
    for bits, other_bits in zip(one.bits, other.bits, strict=True):
        np.testing.assert_array_equal(bits, other_bits)


def test_a_greedy_text_is_the_same_with_drafts(held):
    plain = run(held)
    assert [len(tokens) for tokens in plain.tokens] == [40] * 3
    drafted = run(held, speculation=known(plain))
    assert_same(drafted, plain)
    for row in drafted.rows:
        figures = row.speculation
        assert figures.steps + figures.accepted == 39
        assert 0 < figures.accepted < figures.drafted
        assert figures.tokens_per_step > 1.8
        assert figures.rejected_bits > 0


@pytest.mark.slow
def test_steps_without_drafts_leave_the_text_as_it_is(held):
    """Lookup has drafts in some steps. The others read one row of each text."""
    drafted = run(held, speculation=Speculation(PromptLookup(), always=True))
    assert_same(drafted, run(held))
    for row in drafted.rows:
        assert 0 < row.speculation.drafting_steps < row.speculation.steps


def test_stop_tokens_and_limits_end_a_text_inside_a_draft(held):
    plain = run(held)
    stop = plain.tokens[0][20]
    ends = [tokens.index(stop) + 1 if stop in tokens[:37] else 37 for tokens in plain.tokens]
    speculation = known(plain, wrong=0)
    ended = run(held, max_tokens=37, stop_tokens=[stop], speculation=speculation)
    assert ended.tokens == [tokens[:end] for tokens, end in zip(plain.tokens, ends, strict=True)]
    assert [row.reason for row in ended.rows] == ["length"] * 3  # The receiver knows no stop tokens.


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 30}]
)
@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.4}])
def test_any_text_is_the_same_with_drafts(held, options, penalty):
    plain = run(held, **options, **penalty)
    for speculation in (
        known(plain),
        known(plain, wrong=0),
        known(plain, wrong=1),
        known(plain, most=2),
        Speculation(PromptLookup(), always=True),
        Speculation(PromptLookup(), most_drafts=1, always=True),
    ):
        assert_same(run(held, **options, **penalty, speculation=speculation), plain)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_dial_that_follows_depends_on_no_draft(generator, temperature):
    """With drafts that are never there, drafts that are right, and drafts of other numbers."""
    options = {"temperature": temperature, "max_tokens": 60}
    plain = run(
        generator, **options, speculation=Speculation(KnownTexts.of([[]] * 3, CONTEXT, most=0), always=True)
    )
    assert all(row.speculation.drafted == 0 for row in plain.rows)
    assert len({tuple(np.round(bits.mean(axis=1), 3)) for bits in plain.bits}) == 3
    for speculation in (
        known(plain),
        known(plain, wrong=0),
        known(plain, wrong=7, most=3),
        dataclasses.replace(known(plain), most_drafts=1),
        dataclasses.replace(known(plain), always=False),
        Speculation(PromptLookup()),
    ):
        assert_same(run(generator, **options, speculation=speculation), plain)


@pytest.mark.slow
def test_the_dial_reads_the_wanted_bits_with_drafts(generator):
    options = {"max_tokens": 60, "bits": 4.0, "temperature": 0.5}
    plain = run(generator, **options)
    drafted = run(generator, **options, speculation=known(run(generator, **options)))
    for bits, other in zip(drafted.bits, plain.bits, strict=True):
        assert abs(bits.mean() - other.mean()) < 0.15


@pytest.mark.slow
def test_a_block_of_the_dial_has_one_setting(generator):
    """The bits change only where a block begins."""
    batch = run(generator, PROMPTS[:1], max_tokens=50, speculation=Speculation(PromptLookup(), always=True))
    state = batch.dial_state
    assert float(state.decoded[0]) == 49 // BLOCK * BLOCK


@pytest.mark.slow
def test_the_end_of_the_cache_ends_a_text(held):
    plain = run(held, max_tokens=200)
    assert [len(tokens) for tokens in plain.tokens] == [CONTEXT - len(prompt) for prompt in PROMPTS]
    assert_same(run(held, max_tokens=200, speculation=known(plain, wrong=0)), plain)
