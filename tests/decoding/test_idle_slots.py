"""Slots without a text, or whose text has ended, have the length 0, so their attention costs nothing."""

import numpy as np
import pytest
from batch import Batch

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.texts import Received

PROMPTS = [list(range(100, 140)), [5, 6, 7]]
# The context of test_texts.py, for the same programs of prefill.
OPTIONS = {"max_context": 160, "bits": 3.0, "temperature": 0.0, "max_tokens": 64, "stop_tokens": (-1, -1)}


@pytest.fixture(scope="module")
def generator(one_layer_generator):
    return one_layer_generator


@pytest.mark.parametrize(
    "device_policy", [policy.CPU, pytest.param(policy.GPU, marks=pytest.mark.slow)], ids=["cpu", "gpu"]
)
def test_an_idle_slot_has_no_length_and_its_next_text_is_unchanged(generator, device_policy):
    def lengths() -> list[int]:
        return np.asarray(batch.texts.device._state.slots.lengths).tolist()

    options = OPTIONS | {"policy": device_policy, "slots": 3}
    alone = [Batch(generator, [prompt], **options).run()[0] for prompt in PROMPTS]
    batch = Batch(generator, PROMPTS, ended=lambda row, tokens: row == 0 and len(tokens) > 16, **options)
    batch.prefill()
    assert lengths()[2] == 0  # unused
    slot = batch.jobs[0].slot
    while not batch.jobs[0].ended:
        assert lengths()[slot] >= len(PROMPTS[0])
        batch.texts.advance()
    assert lengths()[slot] == 0
    batch.texts.advance()  # a chunk of the other text, which writes to the idle slots, too
    assert lengths()[slot] == 0
    later = Received()
    batch.texts.add(Job(PROMPTS[0], batch.jobs[0].settings, later))
    while not batch.texts.idle:
        batch.texts.advance()
    batch.texts.close()
    assert batch.rows[1].tokens == alone[1]
    assert later.tokens == alone[0]
    assert batch.rows[0].tokens == alone[0][: len(batch.rows[0].tokens)]
