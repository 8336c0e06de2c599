"""Answers of the bundled model, with programs compiled as outside tests: the same alone and in company."""

import numpy as np
import pytest

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.serving.engine import Engine


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_an_answer_of_the_bundled_model_is_the_same_alone_and_in_company():
    generator = Generator.load(BUNDLED_MODEL)
    prompts = [f"Once upon a time there was a {word}" for word in ("cat", "dog", "ship", "tree", "king")]
    requests = [Request(bits=bits, max_tokens=48, temperature=0.0) for bits in (2.0, 3.0, 4.0, "full", 2.5)]
    with Engine(generator, slots=4, max_context=128, page_size=16, piece=64) as engine:
        together = engine.generate_many(prompts, requests)
        alone = [engine.generate_many([p], r)[0] for p, r in zip(prompts, requests, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(one.grading_stats.packed, other.grading_stats.packed)
