"""Decode chunks of a batch under the policies of a CPU and of a GPU, both run on a CPU."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from grinqh_jax.decoding import engine, policy
from grinqh_jax.decoding.batch import Decoding
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling

pytestmark = pytest.mark.usefixtures("optimized_programs")

PROMPTS = [[5, 6, 7], list(range(100, 140)), [40, 41]]
NEVER = (-1, -1)
"""Stop tokens that no row generates; as many as in the tests of stop tokens, for the same programs."""


@pytest.fixture(params=[policy.CPU, policy.GPU], ids=["cpu", "gpu"])
def device_policy(request) -> DecodePolicy:
    return request.param


@pytest.fixture
def dispatched(monkeypatch) -> list[int]:
    """Steps of each decode chunk that was dispatched."""
    steps, original = [], engine.decode_chunk

    def counted(*args, **options):
        steps.append(options["steps"])
        return original(*args, **options)

    monkeypatch.setattr(engine, "decode_chunk", counted)
    return steps


def prepared(generator, prompts=PROMPTS, bits="full", **options) -> Decoding:
    """A batch of 101 tokens per row, before its prefill."""
    usual = {"max_tokens": 101, "max_context": 160, "stop_tokens": NEVER}
    usual |= {"sampling": Sampling.create(len(prompts))}
    dial = generator.dial(bits, batch=len(prompts))
    return Decoding(generator.model, prompts, **usual | options, dial=dial)


def prefilled(generator, *args, **options) -> Decoding:
    """The same batch after its prefill."""
    decoding = prepared(generator, *args, **options)
    decoding.prefill()
    return decoding


def texts(generator, **options) -> list[list[int]]:
    """All generated tokens of every row."""
    decoding = prepared(generator, **options)
    rows = decoding.prefill().tokens
    for chunk in decoding.chunks():
        rows = [row + new for row, new in zip(rows, chunk.tokens, strict=True)]
    return rows


def test_chunks_have_the_length_of_the_policy(generator, device_policy, dispatched):
    usual = [chunk.tokens[0] for chunk in prefilled(generator, policy=device_policy).chunks()]
    assert [len(tokens) for tokens in usual] == (
        [32, 32, 32, 4] if device_policy is policy.GPU else [16] * 6 + [4]
    )
    assert len(dispatched) == len(usual)  # No chunk is launched beyond the limit.
    eights = dataclasses.replace(device_policy, chunk_steps=8)
    short = [chunk.tokens[0] for chunk in prefilled(generator, policy=eights).chunks()]
    assert [len(tokens) for tokens in short] == [8] * 12 + [4]
    assert list(itertools.chain(*usual)) == list(itertools.chain(*short))


def test_the_next_chunk_is_launched_ahead_on_a_gpu(generator, device_policy, dispatched):
    chunks = prefilled(generator, PROMPTS[:1], policy=device_policy).chunks()
    for seen in range(1, 4):
        next(chunks)
        assert len(dispatched) == seen + device_policy.chunks_ahead
    chunks.close()


def test_rows_end_where_they_should(generator, device_policy):
    short = dataclasses.replace(device_policy, chunk_steps=8)
    free = texts(generator, policy=short)
    assert [len(row) for row in free] == [101] * 3
    ends = free[0][20], free[1][50]
    until = [next((i + 1 for i, token in enumerate(row) if token in ends), 101) for row in free]
    assert until[0] <= 21
    ended = texts(generator, policy=short, stop_tokens=ends)
    assert ended == [row[:n] for row, n in zip(free, until, strict=True)]
    full = texts(generator, policy=short, max_tokens=150)  # the longest prompt has 40, and the context 160
    assert [len(row) for row in full] == [150, 120, 150]
    assert [row[:101] for row in full] == free


def test_a_stopped_row_yields_nothing_further(generator, device_policy, dispatched):
    short = dataclasses.replace(device_policy, chunk_steps=8)
    free = texts(generator, policy=short)
    decoding = prepared(generator, policy=short)
    rows = decoding.prefill().tokens
    dispatched.clear()
    for i, chunk in enumerate(decoding.chunks()):
        rows = [row + new for row, new in zip(rows, chunk.tokens, strict=True)]
        if i == 1:
            decoding.stop(np.array([True, False, False]))
        if i == 3:
            decoding.stop(np.array([False, True, True]))
    assert rows == [free[0][:17], free[1][:33], free[2][:33]]
    assert len(dispatched) == 4 + device_policy.chunks_ahead


def test_only_the_time_of_the_model_counts(generator, device_policy):
    """The consumer takes longer for a chunk than the model does."""
    decoding = prefilled(generator, PROMPTS[:1], policy=device_policy)
    decoding.compile_decode()
    started, seconds = time.perf_counter(), []
    for chunk in decoding.chunks():
        seconds.append(chunk.seconds)
        time.sleep(0.3)
    took = time.perf_counter() - started - 0.3 * len(seconds)
    assert min(seconds) > 0
    assert sum(seconds) < 0.3 * len(seconds)
    assert max(seconds[1:]) < 0.3
    if not device_policy.chunks_ahead:
        assert took / 2 < sum(seconds) <= took


def read(generator, device_policy, prompts=PROMPTS, bits=3.0, **options):
    """Tokens of every row, and the bits that each of its steps and linear layers read."""
    decoding = prepared(generator, prompts, bits=bits, policy=device_policy, **options)
    tokens = decoding.prefill().tokens
    steps = [[] for _ in prompts]
    for chunk in decoding.chunks():
        for row, new in enumerate(chunk.tokens):
            tokens[row] += new
            steps[row] += list(chunk.grading_stats.bits[: len(new), row])
    return tokens, [np.array(row) for row in steps]


EVERY_CHUNK = list(itertools.product((policy.CPU, policy.GPU), (1, 4, 16, 32)))
USUAL_CHUNKS = [(policy.CPU, 16), (policy.GPU, 32)]


@pytest.mark.parametrize(
    ("temperature", "chunks"),
    [
        # Programs of other tests.
        pytest.param(0.0, [*USUAL_CHUNKS, (policy.CPU, 8), (policy.GPU, 8)], id="greedy"),
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
            sampling=Sampling.create(3, temperature=temperature),
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
    decoding = prefilled(generator, PROMPTS[:1], bits=3.0, policy=device_policy, max_tokens=30)
    dial = decoding._device.dial
    position, settings = len(PROMPTS[0]), []
    for chunk in decoding.chunks():
        for step in chunk.grading_stats.bits:
            settings.append(float(dial.setting[0]))
            dial = dial.follow(step, np.ones(1, bool), np.full(1, position))
            position += 1
    assert len(set(settings)) == len(settings) == 29
    np.testing.assert_allclose(decoding._device.dial.state.debt, dial.state.debt, atol=1e-4)
    np.testing.assert_allclose(decoding._device.dial.setting, dial.setting, atol=1e-4)


def test_rows_that_have_ended_read_no_weights(generator):
    decoding = prefilled(generator)
    decoding.stop(np.array([True, False, False]))
    bits = next(decoding.chunks()).grading_stats.bits
    assert (bits[:, 0] == 0).all()
    assert (bits[:, 1:] > 0).all()
