"""Decode chunks on a GPU, the next one launched ahead: their length does not change the text."""

import dataclasses

import numpy as np
import pytest

from grinqh_jax import BUNDLED_MODEL, Generator
from grinqh_jax.decoding import policy
from grinqh_jax.decoding.batch import Decoding
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling

pytestmark = pytest.mark.gpu

PROMPTS = ["The old house", "Once upon a time there was a", "She said"]
TOKENS = 120


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(BUNDLED_MODEL)


def in_chunks_of(steps: int) -> DecodePolicy:
    return dataclasses.replace(policy.GPU, chunk_steps=steps)


def prepared(generator, temperature, **options) -> Decoding:
    prompts = [generator.tokenizer.encode(prompt) for prompt in PROMPTS]
    return Decoding(
        generator.model,
        prompts,
        max_tokens=TOKENS,
        max_context=256,
        dial=generator.dial(
            "full", batch=len(prompts)
        ),  # full bits: the setting never changes, so chunks do not matter
        sampling=Sampling.create(len(prompts), temperature=temperature, seed=7),
        **options,
    )


def text(decoding: Decoding) -> tuple[list[list[int]], list[int]]:
    """Returns all generated tokens of every row, and the number of the first row's tokens in each chunk."""
    rows, lengths = decoding.prefill().tokens, []
    for chunk in decoding.chunks():
        rows = [row + new for row, new in zip(rows, chunk.tokens, strict=True)]
        lengths.append(len(chunk.tokens[0]))
    return rows, lengths


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chunks_do_not_change_the_text(generator, temperature):
    assert DecodePolicy.for_device() is policy.GPU
    whole, lengths = text(prepared(generator, temperature, policy=in_chunks_of(TOKENS)))
    assert lengths == [TOKENS - 1]
    assert [len(row) for row in whole] == [TOKENS] * 3
    for options, expected in (({}, [32, 32, 32, 23]), ({"policy": in_chunks_of(7)}, [7] * 17)):
        rows, lengths = text(prepared(generator, temperature, **options))
        assert lengths == expected
        assert rows == whole


def test_rows_end_where_they_should(generator):
    whole, _ = text(prepared(generator, 0.8))
    end = whole[0][40]
    expected = [row[: row.index(end) + 1] if end in row else row for row in whole]
    rows, _ = text(prepared(generator, 0.8, policy=in_chunks_of(16), stop_tokens=[end]))
    assert rows == expected
    decoding = prepared(generator, 0.8, policy=in_chunks_of(16))
    rows = decoding.prefill().tokens
    for i, chunk in enumerate(decoding.chunks()):
        rows = [row + new for row, new in zip(rows, chunk.tokens, strict=True)]
        if i == 1:
            decoding.stop(np.array([True, False, True]))
    assert rows == [whole[0][:33], whole[1], whole[2][:33]]
