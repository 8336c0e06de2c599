"""Prompt lookup against a search in Python, and its decision how much to draft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples

from grinqh_jax.decoding.slots.step_shapes import StepShape, row_counts, step_shapes
from grinqh_jax.decoding.speculation.draft_length import Acceptance, DraftLength, StepTimes
from grinqh_jax.decoding.speculation.lookup import look_up

SLOTS, LEAST, MOST, COUNT = 24, 2, 4, 5
look_up_jitted = jax.jit(look_up, static_argnums=(2, 3, 4))


def searched(tokens: list[int]) -> list[int]:
    """The draft after a text: what follows the longest and last occurrence of its end, repeated if short.

    None if another occurrence as long is followed by another token.
    """
    best, start, next_tokens = 0, 0, set()
    for place in range(1, len(tokens)):
        matched = 0
        while matched < min(MOST, place) and tokens[place - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched >= max(best, LEAST):
            next_tokens = next_tokens if matched == best else set()
            next_tokens.add(tokens[place])
            best, start = matched, place
    if len(next_tokens) != 1:
        return []
    following = tokens[start:]
    return [following[i % len(following)] for i in range(COUNT)]


@examples(30)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=SLOTS), min_size=2, max_size=2))
def test_lookup_finds_the_longest_and_last_occurrence(texts):
    tokens = np.full((2, SLOTS), 1, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = jnp.array([len(text) for text in texts])
    draft = look_up_jitted(jnp.asarray(tokens), lengths, COUNT, LEAST, MOST)
    for row, text in enumerate(texts):
        assert draft.tokens[row, : draft.counts[row]].tolist() == searched(text)


def shapes(slots: int, most_drafts: int, contiguous: bool) -> list[StepShape]:
    return step_shapes(row_counts(slots, fixed=contiguous), most_drafts, contiguous)


def test_steps_share_sixteen_rows():
    assert shapes(1, 7, True) == [(1, 0), (1, 7)]
    assert shapes(4, 7, True) == [(4, 0), (4, 3)]
    assert shapes(4, 7, False) == [(4, 0), (1, 0), (2, 0), (4, 3), (1, 7), (2, 7)]
    assert shapes(16, 7, False)[5:] == [(1, 7), (2, 7), (4, 3), (8, 1)]
    assert shapes(64, 7, True) == [(64, 0)]
    for slots in range(1, 17):
        for contiguous in (True, False):
            assert all(s.texts * (s.drafts + 1) <= 16 for s in shapes(slots, 15, contiguous))


def test_a_step_decodes_a_power_of_two_or_all_slots():
    assert row_counts(16, fixed=False) == [16, 1, 2, 4, 8]
    assert row_counts(6, fixed=False) == [6, 1, 2, 4]
    assert row_counts(1, fixed=False) == [1]
    assert row_counts(16, fixed=True) == [16]
    assert row_counts(64, fixed=False) == [64, 16, 32]  # all at one level


def test_chunks_of_longer_steps_have_fewer_of_them():
    assert StepShape(1, 0).steps(32) == 32
    assert StepShape(8, 0).steps(32) == 16
    assert StepShape(1, 7).steps(32) == 8  # The host learns soon whether drafts pay.
    assert StepShape(1, 7).steps(8) == 4


def accepting(rate: float, drafts: int = 7) -> Acceptance:
    """The estimates after many steps in which each draft was accepted with this probability."""
    acceptance, rng = Acceptance(), np.random.default_rng(0)
    for _ in range(100):
        accepted = int(np.argmin([*(rng.random(drafts) < rate), False]))
        acceptance.update(1, 1, drafts, accepted)
    return acceptance


def measure(length: DraftLength, shape: StepShape, seconds: float) -> None:
    """Adds the time of a chunk of one step, which verifies drafts if the shape has any."""
    length.measure(shape, 1, int(shape.drafts > 0), seconds)


def test_the_estimate_of_the_acceptance_is_that_of_a_draft_after_accepted_ones():
    for rate in (0.0, 0.5, 0.9):
        estimates = accepting(rate)
        assert abs(estimates.accepted / estimates.tried - rate) < 0.15
        expected = sum(rate**i for i in range(8))
        assert abs(estimates.tokens_per_step(7) - expected) < 0.25 * expected


def test_a_text_without_drafts_expects_one_token_a_step():
    acceptance = Acceptance()
    acceptance.update(100, 0, 0, 0)
    assert acceptance.tokens_per_step(7) < 1.01


def test_the_length_follows_acceptance_and_measured_times():
    length = DraftLength(shapes(1, 7, True))
    for shape, seconds in zip(length.shapes, (1.0, 1.9), strict=True):
        measure(length, shape, seconds)
    assert length.choose([accepting(0.95)]) == (1, 7)
    assert length.choose([accepting(0.0)]) == (1, 0)
    slow = DraftLength(length.shapes)
    for shape in slow.shapes:
        measure(slow, shape, 1.0 + shape.drafts)
    assert slow.choose([accepting(0.9)]) == (1, 0)


def test_before_a_measurement_a_further_row_costs_a_fifth_of_a_step():
    length = DraftLength(shapes(1, 7, True))
    # A step with 7 drafts takes 2.4 plain steps. It yields 3.6 tokens of a new text, 2.5 or 2.3 of others.
    assert length.choose([Acceptance()]) == (1, 7)
    assert length.choose([Acceptance(accepted=6.1, tried=10.0)]) == (1, 7)
    assert length.choose([Acceptance(accepted=5.8, tried=10.0)]) == (1, 0)


def test_several_processes_that_measure_other_times_choose_the_same():
    lengths = [DraftLength(shapes(1, 7, True), measures=False) for _ in range(2)]
    for process, length in enumerate(lengths):
        for shape in length.shapes:
            measure(length, shape, 1.0 + process * shape.drafts)
    for rate in (0.0, 0.5, 0.95):
        first, second = (length.choose([accepting(rate)]) for length in lengths)
        assert first == second


def test_a_text_with_few_drafts_has_none_where_steps_read_all_rows():
    text = Acceptance(accepted=100.0, tried=100.1, steps=10.0, drafting=1.0)  # 1.7 tokens a step
    for all_rows, wanted in ((False, 7), (True, 0)):
        assert DraftLength(shapes(1, 7, True), reads_all_rows=all_rows).choose([text]).drafts == wanted


def test_where_steps_read_all_rows_they_take_the_same_time_whatever_texts_draft():
    length, shape = DraftLength([StepShape(1, 0), StepShape(1, 7)], reads_all_rows=True), StepShape(1, 7)
    for drafting in [0, 8, 1] * 30:
        length.measure(shape, 8, drafting, 8 * 2.4)
    assert length.times[shape] == StepTimes(pytest.approx(2.4), pytest.approx(2.4))


@pytest.mark.parametrize("pause", [0.01, 1.5, 15.0])
def test_times_recover_from_a_wrong_first_measurement(pause):
    length, shape = DraftLength([StepShape(1, 0), StepShape(1, 7)]), StepShape(1, 7)
    length.measure(shape, 8, 0, 8 * pause)
    for _ in range(300):
        length.measure(shape, 8, 1, 7 * 1.5 + 3.0)
        assert 0 < length.times[shape].idle <= length.times[shape].drafting
    for _ in range(40):
        length.measure(shape, 8, 8, 8 * 3.0)
    assert length.times[shape].drafting == pytest.approx(3.0, rel=0.01)


def test_drafts_are_tried_now_and_then_where_they_do_not_pay():
    length = DraftLength(shapes(1, 7, True))
    for shape in length.shapes:
        measure(length, shape, 1.0 + shape.drafts)
    chosen = [length.choose([accepting(0.0)]) for _ in range(70)]
    tried = [i for i, shape in enumerate(chosen) if shape.drafts]
    assert tried == [32, 65]
    assert {chosen[i] for i in tried} == {StepShape(1, 7)}


def test_more_texts_have_fewer_drafts():
    length = DraftLength(shapes(16, 7, False))
    texts = [accepting(0.9)] * 16
    assert length.choose(texts[:1]) == (1, 7)
    assert length.choose(texts[:2]) == (2, 7)
    assert length.choose(texts[:3]) == (4, 3)
    assert length.choose(texts[:7]) == (8, 1)
    assert length.choose(texts) == (16, 0)
    for count in (1, 2, 3, 5, 8, 9):
        few = [accepting(0.0)] * count
        assert length.choose(few) == (1 << (count - 1).bit_length(), 0)


def test_a_pause_of_the_host_does_not_stop_drafts_for_long():
    length = DraftLength([StepShape(1, 0), StepShape(1, 7)])
    for shape, seconds in zip(length.shapes, (1.0, 1.9), strict=True):
        measure(length, shape, seconds)
    measure(length, StepShape(1, 7), 100.0)
    assert length.times[StepShape(1, 7)].drafting < 4


@pytest.mark.parametrize("idle", [1.02, 2.9])
def test_the_times_of_steps_with_and_without_drafts_are_told_apart(idle):
    """Only means over chunks are measured. Where a step reads all rows, both times are the same."""
    length, rng = DraftLength([StepShape(1, 0), StepShape(1, 7)]), np.random.default_rng(0)
    for _ in range(200):
        drafting = int(rng.choice([0, 2, 8, 16]))
        length.measure(StepShape(1, 7), 16, drafting, (16 - drafting) * idle + drafting * 3.0)
    times = length.times[StepShape(1, 7)]
    assert times.idle == pytest.approx(idle, rel=0.01)
    assert times.drafting == pytest.approx(3.0, rel=0.01)
    # A chunk with few drafts does not make drafts cheap, nor one with many make them dear.
    for drafting in (0, 16):
        seconds = (16 - drafting) * idle + drafting * 3.0
        length.measure(StepShape(1, 7), 16, drafting, seconds)
        assert length.times[StepShape(1, 7)].drafting == pytest.approx(3.0, rel=0.01)


def test_a_text_with_few_drafts_needs_a_clear_gain():
    """One step of 50 accepts 6.9 drafts for 1.1 plain steps. At 1.11 all steps together gain 0.7 %."""
    text = Acceptance(accepted=100.0, tried=100.1, steps=50.0, drafting=1.0)
    length = DraftLength([StepShape(1, 0), StepShape(1, 7)])
    for shape, seconds in zip(length.shapes, (1.0, 2.1), strict=True):
        measure(length, shape, seconds)
    for idle, wanted in ((1.0, 7), (1.1, 7), (1.11, 0), (1.2, 0)):
        length.times[StepShape(1, 7)] = StepTimes(idle, 2.1)
        assert length.choose([text]).drafts == wanted
