"""Fixture: the engine that the tests of serving share."""

import pytest


@pytest.fixture(scope="session")
def engine(generator):
    from engine_cases import SHORT, SIZES

    from grinqh_jax.serving.engine import Engine

    with Engine(generator, **SIZES, prompt_logprobs=True, grammars=True, policy=SHORT) as engine:
        yield engine
