"""Marks of parameters."""

import pytest


def slow(*values) -> list:
    """Marks values of ``pytest.mark.parametrize`` as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
