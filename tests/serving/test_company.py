"""Answers of the bundled model, with programs compiled as outside tests: the same alone and in company."""

import numpy as np
import pytest

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.request import Request
from grinqh_jax.serving.engine import Engine

WORDS = ["cat", "dog", "ship", "tree", "king", "bird", "house", "boy"]


def assert_same_alone_and_in_company(monkeypatch):
    """Answers begin and end one after another, so chunks of all numbers of rows decode parts of them."""
    generator = Generator.load(BUNDLED_MODEL)
    prompts = [f"Once upon a time there was a {size} {word}" for size in ("big", "small") for word in WORDS]
    bits = [2.0, 3.0, 4.0, "full", 2.5, 3.0, 3.5, 3.0] * 2
    requests = [
        Request(bits=each, max_tokens=100 + 9 * i, temperature=0.0, stop_tokens=())
        for i, each in enumerate(bits)
    ]
    rows: set[int] = set()
    with Engine(generator, slots=16, max_context=300, piece=64) as engine:
        device = engine.scheduler._device
        generate = device.generate
        monkeypatch.setattr(
            device, "generate", lambda slots, *rest: (rows.add(len(slots)), generate(slots, *rest))[1]
        )
        together = engine.generate_many(prompts, requests)
        assert rows == {1, 2, 4, 8, 16}
        # Chunks of 8 texts and more have half as many steps.
        steps = DecodePolicy.for_engine().chunk_steps
        assert {steps // 2, steps} <= {len(piece.tokens) for answer in together for piece in answer}
        rows.clear()
        alone = [engine.generate_many([p], r)[0] for p, r in zip(prompts, requests, strict=True)]
        assert rows == {1}
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(one.grading_stats.packed, other.grading_stats.packed)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_an_answer_of_the_bundled_model_is_the_same_alone_and_in_company(monkeypatch):
    assert_same_alone_and_in_company(monkeypatch)


@pytest.mark.gpu
def test_an_answer_on_a_gpu_is_the_same_alone_and_in_company(monkeypatch):
    assert_same_alone_and_in_company(monkeypatch)
