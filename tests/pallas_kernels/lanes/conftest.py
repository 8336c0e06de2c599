"""Fixtures of the tests of the lane language."""

import numpy as np
import pytest


@pytest.fixture
def isa():
    from one_cta import new_isa  # not above: see `prepare_jax`

    return new_isa()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
