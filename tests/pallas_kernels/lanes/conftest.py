"""Fixtures of the tests of the lane language."""

import numpy as np
import pytest
from one_cta import new_isa


@pytest.fixture
def isa():
    return new_isa()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
