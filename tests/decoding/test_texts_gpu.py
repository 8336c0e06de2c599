"""Decode chunks on a GPU, the next one launched ahead: their length does not change the text."""

import dataclasses

import pytest
from batch import Batch

from grinqh_jax import BUNDLED_MODEL, Generator
from grinqh_jax.decoding import policy
from grinqh_jax.decoding.policy import DecodePolicy

pytestmark = pytest.mark.gpu

PROMPTS = ["The old house", "Once upon a time there was a", "She said"]
TOKENS = 120


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(BUNDLED_MODEL)


def in_chunks_of(steps: int) -> DecodePolicy:
    return dataclasses.replace(policy.GPU, chunk_steps=steps)


def prepared(generator, temperature, **options) -> Batch:
    prompts = [generator.tokenizer.encode(prompt) for prompt in PROMPTS]
    # At full bits the setting never changes, so chunks do not matter.
    return Batch(
        generator,
        prompts,
        bits="full",
        max_tokens=TOKENS,
        max_context=256,
        temperature=temperature,
        seed=7,
        **options,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chunks_do_not_change_the_text(generator, temperature):
    assert DecodePolicy.for_device() is policy.GPU
    batch = prepared(generator, temperature, policy=in_chunks_of(TOKENS))
    whole = batch.run()
    assert batch.chunks[0] == [1, TOKENS - 1]
    assert [len(row) for row in whole] == [TOKENS] * 3
    for options, expected in (({}, [1, 32, 32, 32, 23]), ({"policy": in_chunks_of(7)}, [1, *[7] * 17])):
        batch = prepared(generator, temperature, **options)
        assert batch.run() == whole
        assert batch.chunks[0] == expected


def test_rows_end_where_they_should(generator):
    whole = prepared(generator, 0.8).run()
    end = whole[0][40]
    expected = [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert prepared(generator, 0.8, policy=in_chunks_of(16), stop_tokens=[end]).run() == expected
    ends = [33, TOKENS, 33]
    rows = prepared(
        generator, 0.8, policy=in_chunks_of(16), ended=lambda row, tokens: len(tokens) == ends[row]
    ).run()
    assert rows == [row[:end] for row, end in zip(whole, ends, strict=True)]
