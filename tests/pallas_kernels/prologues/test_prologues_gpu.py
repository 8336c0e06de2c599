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
        decoded = run.run(dial)
        return decoded.tokens, [chunk.grading_stats.packed for chunk in decoded.chunks]

    expected = jax.tree.leaves(chunk())
    for prologues in (("attention",), ("swiglu",), ("attention", "swiglu")):
        for array, separate in zip(jax.tree.leaves(chunk(*prologues)), expected, strict=True):
            np.testing.assert_array_equal(array, separate)
