"""Decode steps with prologues on a GPU: the bits of separate launches."""

import jax
import numpy as np
import pytest

from grinqh_jax.benchmarking import random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Llama-3.2-1B"])
@pytest.mark.parametrize("context", [5, 1000])
def test_generates_the_tokens_of_separate_launches(name, context):
    model = random_model.graded(random_model.shape(name))
    dial = DecodeRun(model, context, 8).settle(random_model.TARGETS, 3.0)

    def chunk(*prologues):
        run = DecodeRun(model, context, 8, prologues=frozenset(prologues))
        return jax.tree.map(np.asarray, run.run(dial))

    expected = chunk()
    for prologues in (("attention",), ("swiglu",), ("attention", "swiglu")):
        fused = chunk(*prologues)
        np.testing.assert_array_equal(fused.tokens, expected.tokens)
        np.testing.assert_array_equal(fused.grading_stats.packed, expected.grading_stats.packed)
