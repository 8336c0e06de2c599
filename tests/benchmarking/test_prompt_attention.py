"""``benchmarks/prompt_attention.py``: its two ways are different programs."""

import pathlib

import jax.numpy as jnp

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.benchmarking import random_model
from grinqh_jax.model import fused_attention

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def test_each_way_is_traced(monkeypatch):
    """A trace of the first way must not serve the second one."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Importing the script sets it.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prompt_attention

    calls = []

    def attend(queries, *others):
        calls.append(queries.shape)
        return jnp.zeros_like(queries)

    monkeypatch.setattr(fused_attention, "attend", attend)
    monkeypatch.setattr(fused_attention, "lacks", lambda *_: None)
    arguments = prompt_attention.arguments_of(random_model.shape(str(BUNDLED_MODEL)), 32, 64, 48)
    prompt_attention.program(arguments, by_cudnn=False)
    assert calls == []
    prompt_attention.program(arguments, by_cudnn=True)
    assert calls == [arguments[0].shape]
