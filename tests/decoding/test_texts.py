"""Decode chunks of a batch under the policies of a CPU and of a GPU, both run on a CPU."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch import Batch
from marks import slow

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.slots.device import Device

PROMPTS = [[5, 6, 7], list(range(100, 140)), [40, 41]]
NEVER = (-1, -1)
"""Stop tokens that no row generates; as many as in the tests of stop tokens, for the same programs."""


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


@pytest.fixture(params=["gpu", *slow("cpu")])
def device_policy(request) -> DecodePolicy:
    """The policy of a device, with short chunks."""
    usual = policy.GPU if request.param == "gpu" else policy.CPU
    return dataclasses.replace(usual, chunk_steps=8)


@pytest.fixture
def dispatched(monkeypatch) -> list:
    """Results of the decode chunks that were dispatched."""
    chunks, original = [], Device.generate

    def recorded(*args):
        chunks.append(original(*args))
        return chunks[-1]

    monkeypatch.setattr(Device, "generate", recorded)
    return chunks


def prepared(generator, prompts=PROMPTS, **options) -> Batch:
    """A batch of 101 tokens per row, before its prefill."""
    return Batch(
        generator, prompts, **{"max_tokens": 101, "max_context": 160, "stop_tokens": NEVER} | options
    )


def prefilled(generator, *args, **options) -> Batch:
    """The same batch after its prefill."""
    batch = prepared(generator, *args, **options)
    batch.prefill()
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("device_policy", [policy.CPU, policy.GPU])
def test_chunks_have_the_length_of_the_policy(generator, device_policy, dispatched):
    usual = prepared(generator, policy=device_policy)
    usual.run()
    assert usual.chunks[0] == ([1, 32, 32, 32, 4] if device_policy is policy.GPU else [1, *[16] * 6, 4])
    assert len(dispatched) == len(usual.chunks[0]) - 1  # No chunk is launched beyond the limit.
    eights = prepared(generator, policy=dataclasses.replace(device_policy, chunk_steps=8))
    eights.run()
    assert eights.chunks[0] == [1, *[8] * 12, 4]
    assert usual.tokens == eights.tokens


def test_the_next_chunk_is_launched_ahead_on_a_gpu(generator, device_policy, dispatched):
    batch = prefilled(generator, PROMPTS[:1], policy=device_policy)
    assert len(dispatched) == device_policy.chunks_ahead  # The first token does not wait for a chunk.
    chunks = batch.steps()
    for seen in range(1, 4):
        next(chunks)
        assert len(dispatched) == seen + device_policy.chunks_ahead
    chunks.close()


def test_rows_end_where_they_should(generator, device_policy):
    free = prepared(generator, policy=device_policy).run()
    assert [len(row) for row in free] == [101] * 3
    ends = free[0][20], free[1][50]
    until = [next((i + 1 for i, token in enumerate(row) if token in ends), 101) for row in free]
    assert until[0] <= 21
    ended = prepared(generator, policy=device_policy, stop_tokens=ends).run()
    assert ended == [row[:n] for row, n in zip(free, until, strict=True)]
    # The longest prompt has 40 tokens, and the context 160.
    full = prepared(generator, policy=device_policy, max_tokens=150).run()
    assert [len(row) for row in full] == [150, 120, 150]
    assert [row[:101] for row in full] == free


def test_a_stopped_row_yields_nothing_further(generator, device_policy, dispatched):
    free = prepared(generator, policy=device_policy).run()
    ends = [17, 33, 33]
    dispatched.clear()
    rows = prepared(generator, policy=device_policy, ended=lambda row, tokens: len(tokens) == ends[row]).run()
    assert rows == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(dispatched) == 4 + device_policy.chunks_ahead


@pytest.mark.slow
def test_the_next_prompt_takes_the_slot_of_a_text_that_has_ended(generator, device_policy, dispatched):
    """With three slots for four prompts, the texts are those of the same prompts alone."""
    prompts, lengths = [*PROMPTS, PROMPTS[0]], [9, 41, 25, 17]
    alone = [
        prepared(generator, [prompt], max_tokens=length, policy=device_policy).run()[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    batch = prepared(
        generator,
        prompts,
        policy=device_policy,
        slots=3,
        ended=lambda row, tokens: len(tokens) >= lengths[row],
    )
    rows = [row[:length] for row, length in zip(batch.run(), lengths, strict=True)]
    assert rows == alone
    assert {chunk.tokens.shape[0] for chunk in dispatched[-3:]} == {3}


def test_only_the_time_of_the_model_counts(generator, device_policy):
    """The consumer takes longer for a chunk than the model does."""
    batch = prepared(generator, PROMPTS[:1], policy=device_policy, max_tokens=41)
    batch.compile([32])
    batch.prefill()
    assert len(batch.rows[0].seconds) == 1
    started, count = time.perf_counter(), 0
    for _ in batch.steps():
        count += 1
        time.sleep(0.3)
    took = time.perf_counter() - started - 0.3 * count
    seconds = batch.rows[0].seconds[1:]
    assert len(seconds) == count
    assert min(seconds) > 0
    assert sum(seconds) < 0.3 * len(seconds)
    assert max(seconds[1:]) < 0.3
    if not device_policy.chunks_ahead:
        assert took / 2 < sum(seconds) <= took


def read(generator, device_policy, prompts=PROMPTS, bits=3.0, **options):
    """Tokens of every row, and the bits that each of its steps and linear layers read."""
    batch = prepared(generator, prompts, bits=bits, policy=device_policy, **options)
    return batch.run(), batch.bits


EVERY_CHUNK = list(itertools.product((policy.CPU, policy.GPU), (1, 4, 16, 32)))
USUAL_CHUNKS = [(policy.CPU, 16), (policy.GPU, 32)]


@pytest.mark.parametrize(
    ("temperature", "chunks"),
    [
        pytest.param(0.0, [(policy.GPU, 8), (policy.CPU, 16)], id="greedy"),
        pytest.param(0.0, USUAL_CHUNKS, id="greedy-usual", marks=pytest.mark.slow),
        pytest.param(1.0, USUAL_CHUNKS, id="sampled", marks=pytest.mark.slow),
        pytest.param(0.0, EVERY_CHUNK, id="greedy-every-chunk", marks=pytest.mark.slow),
        pytest.param(1.0, EVERY_CHUNK, id="sampled-every-chunk", marks=pytest.mark.slow),
    ],
)
def test_the_dial_depends_on_no_chunk_and_no_policy(generator, temperature, chunks):
    results = [
        read(
            generator,
            dataclasses.replace(kind, chunk_steps=steps),
            max_tokens=41,
            temperature=temperature,
        )
        for kind, steps in chunks
    ]
    tokens, bits = results[0]
    assert len({tuple(row.mean(axis=1)) for row in bits}) == 3
    for other_tokens, other_bits in results[1:]:
        assert other_tokens == tokens
        for row, other_row in zip(bits, other_bits, strict=True):
            np.testing.assert_array_equal(row, other_row)


def test_the_dial_of_a_row_depends_on_no_other_row(generator, device_policy):
    tokens, bits = read(generator, device_policy, max_tokens=33)
    for row, prompt in enumerate(PROMPTS):
        alone, read_alone = read(generator, device_policy, [prompt], max_tokens=33)
        assert alone == [tokens[row]]
        np.testing.assert_array_equal(read_alone[0], bits[row])


def test_the_dial_follows_every_token(generator, device_policy):
    """The thresholds of each step are those of a dial that has followed all steps before."""
    late = dataclasses.replace(device_policy, chunks_ahead=0)  # so that no chunk precedes the first token
    batch = prefilled(generator, PROMPTS[:1], bits=3.0, policy=late, max_tokens=30)
    dial = generator.dial(3.0).with_state(batch.dial_state)
    dial = dial.with_state(type(dial.state)(np.asarray(dial.state.wanted), np.asarray(dial.state.sums)))
    position, settings = len(PROMPTS[0]), []
    assert len(list(batch.steps())) == -(-29 // late.chunk_steps)
    for step in batch.bits[0]:
        settings.append(float(dial.setting[0]))
        dial = dial.follow(step[None], np.ones(1, bool), np.full(1, position))
        position += 1
    assert len(set(settings)) == len(settings) == 29
    final = dial.with_state(batch.dial_state)
    np.testing.assert_allclose(final.state.debt, dial.state.debt, atol=1e-4)
    np.testing.assert_allclose(final.setting, dial.setting, atol=1e-4)


def test_rows_that_have_ended_read_no_weights(generator, device_policy, dispatched):
    batch = prepared(generator, policy=device_policy, ended=lambda row, tokens: row == 0)
    batch.run()
    assert len(batch.tokens[0]) == 1
    bits = dispatched[1].grading_stats.bits
    assert (bits[:, 0] == 0).all()
    assert (bits[:, 1:] > 0).all()


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_numbers_that_are_not_finite_do_not_reach_the_next_text_of_a_slot(generator, device_policy, slots):
    """The cache is full of NaN, as texts leave it whose activations overflow."""
    prompts = PROMPTS[:slots]
    expected = prepared(generator, prompts, policy=device_policy, max_tokens=20).run()
    batch = prepared(generator, prompts, policy=device_policy, max_tokens=20)
    device = batch.texts.device
    cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), device.cache)
    device._state = dataclasses.replace(device._state, cache=cache)
    assert batch.run() == expected
