"""Requests to an engine of the byte model, and the comparison of their answers with the library's."""

import dataclasses
import random

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.request import Request

SIZES = {"slots": 4, "max_context": 128, "page_size": 16, "prefill_chunk": 32}

SHORT = dataclasses.replace(policy.CPU, chunk_steps=2)

SYSTEM = list(range(40, 130))


def random_case(rng: random.Random) -> tuple[list[int], Request]:
    """A prompt, with a common beginning or not, and a request."""
    shared = SYSTEM[: rng.choice([0, 32, 90, 90])]
    prompt = shared + [rng.randrange(2, 258) for _ in range(rng.randrange(1, 20))]
    sampled = rng.random() < 0.3
    return prompt, Request(
        bits=rng.choice([1.0, 2.5, 3.0, 5.75, "full"]),
        max_tokens=rng.randrange(1, 7),
        temperature=rng.choice([0.5, 1.0]) if sampled else 0.0,
        top_k=rng.choice([0, 5]) if sampled else 0,
        top_p=rng.choice([0.7, 1.0]) if sampled else 1.0,
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logit_bias=rng.choice([{}, {}, {70: 4.0, 71: -100.0}]),
    )


def assert_equals_the_generator(answer, generator, prompt, request):
    alone = generator.generate(prompt, request, max_context=128)
    list(alone)
    assert answer.tokens == alone.tokens
    assert answer.finish_reason == alone.finish_reason
