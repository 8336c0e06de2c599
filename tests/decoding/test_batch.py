"""Chunks of a text: looked at one by one, and, as on a GPU (here a CPU), with the next one under way."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from grinqh_jax.decoding import engine, policy
from grinqh_jax.decoding.batch import Decoding
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling

PROMPTS = [[5, 6, 7], list(range(100, 140)), [40, 41]]


@pytest.fixture(params=[policy.CPU, policy.GPU], ids=["cpu", "gpu"])
def device_policy(request) -> DecodePolicy:
    return request.param


@pytest.fixture
def dispatched(monkeypatch) -> list[int]:
    """Steps of each chunk that the device was asked for."""
    steps, original = [], engine.decode_chunk

    def counted(*args, **options):
        steps.append(options["steps"])
        return original(*args, **options)

    monkeypatch.setattr(engine, "decode_chunk", counted)
    return steps


def prepared(generator, prompts=PROMPTS, bits="full", **options) -> Decoding:
    """A text of 101 tokens."""
    usual = {"max_tokens": 101, "max_context": 160, "sampling": Sampling.create(len(prompts))}
    dial = generator.dial(bits, batch=len(prompts))
    return Decoding(generator.model, prompts, **usual | options, dial=dial)


def begun(generator, *args, **options) -> Decoding:
    """The same, its first token generated."""
    decoding = prepared(generator, *args, **options)
    decoding.prefill()
    return decoding


def texts(generator, **options) -> list[list[int]]:
    """All tokens of every row."""
    decoding = prepared(generator, **options)
    rows = decoding.prefill().tokens
    for chunk in decoding.chunks():
        rows = [row + new for row, new in zip(rows, chunk.tokens, strict=True)]
    return rows


def test_a_text_comes_in_chunks_that_suit_the_device(generator, device_policy, dispatched):
    usual = [chunk.tokens[0] for chunk in begun(generator, PROMPTS[:1], policy=device_policy).chunks()]
    assert [len(tokens) for tokens in usual] == (
        [32, 32, 32, 4] if device_policy is policy.GPU else [16] * 6 + [4]
    )
    assert len(dispatched) == len(usual)  # where the end is foreseen nothing is asked for in vain
    sevens = dataclasses.replace(device_policy, chunk_steps=7)
    short = [chunk.tokens[0] for chunk in begun(generator, PROMPTS[:1], policy=sevens).chunks()]
    assert [len(tokens) for tokens in short] == [7] * 14 + [2]
    assert list(itertools.chain(*usual)) == list(itertools.chain(*short))


def test_the_next_chunk_is_under_way_on_a_gpu(generator, device_policy, dispatched):
    chunks = begun(generator, policy=device_policy).chunks()
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
    full = texts(generator, policy=short, max_context=64)  # the longest prompt has 40
    assert full == [row[: 64 - len(prompt)] for row, prompt in zip(free, PROMPTS, strict=True)]


def test_a_stopped_row_generates_nothing_further(generator, device_policy, dispatched):
    short = dataclasses.replace(device_policy, chunk_steps=8)
    free = texts(generator, policy=short)
    decoding = prepared(generator, policy=short)
    found = decoding.prefill().tokens
    dispatched.clear()
    for i, chunk in enumerate(decoding.chunks()):
        found = [row + new for row, new in zip(found, chunk.tokens, strict=True)]
        if i == 1:
            decoding.stop(np.array([True, False, False]))
        if i == 3:
            decoding.stop(np.array([False, True, True]))
    assert found == [free[0][:17], free[1][:33], free[2][:33]]
    assert len(dispatched) == 4 + device_policy.chunks_ahead


def test_only_the_models_time_counts(generator, device_policy):
    """With a consumer who takes longer for a chunk than the model does."""
    decoding = begun(generator, policy=device_policy)
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


def test_the_dial_follows_what_was_read(generator, device_policy, monkeypatch):
    """Each chunk is set against the setting that it was read at."""
    short = dataclasses.replace(device_policy, chunk_steps=8)
    decoding = begun(generator, PROMPTS[:1], bits=3.0, policy=short)
    dial, used, said = decoding._dial, [], []
    decode, observe = decoding._decode, dial.observe

    def decoded(limits):
        used.append(np.asarray(decoding._thresholds["layers.0.qkv"]))
        return decode(limits)

    def observed(bits, counts, setting):
        targets, tables = np.array(generator.targets), generator.model.linear("layers.0.qkv").thresholds
        columns = np.asarray(tables[...], np.float64).T
        said.append([np.interp(setting[0], targets, column) for column in columns])
        observe(bits, counts, setting)

    monkeypatch.setattr(decoding, "_decode", decoded)
    monkeypatch.setattr(dial, "observe", observed)
    settings = []
    for chunk in decoding.chunks():
        assert chunk.grading_stats is not None
        settings.append(float(dial.setting[0]))
    assert len(used) == 13
    np.testing.assert_allclose(said, np.concatenate(used)[: len(said)], rtol=1e-4)
    assert len(said) == 13
    assert len(set(settings)) >= 12  # the second chunk of a GPU was asked for before the first was known
