"""Another process repeats the calls of an engine's device; here it is a thread with a device of its own."""

import multiprocessing
import random
import threading

import jax
import numpy as np
import pytest
from engine_cases import SHORT, SIZES, random_case

from grinqh_jax.errors import GrinqhError
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.engine_device import engine_device
from grinqh_jax.serving.processes import Follower, Leader

# They compile an engine, as the slow tests of the engine do, which share its programs.
pytestmark = pytest.mark.slow

OPTIONS = {
    "cache_memory": None,
    "prompt_logprobs": True,
    "share_prefixes": True,
    "grammars": False,
}


@pytest.fixture
def follower(generator):
    """Returns a device, its follower, and the other end of the connection."""
    here, there = multiprocessing.Pipe()
    device = engine_device(generator, SHORT, None, **OPTIONS, **SIZES)
    yield device, Follower(there), here
    here.close()
    there.close()


def test_a_follower_reaches_the_state_of_the_leader(generator, follower):
    device, following, connection = follower
    thread = threading.Thread(target=following.follow, args=(device,))
    thread.start()
    rng = random.Random(2)
    cases = [random_case(rng) for _ in range(12)]
    with Engine(
        generator, **SIZES, prompt_logprobs=True, policy=SHORT, leader=Leader([connection])
    ) as engine:
        for _ in range(2):  # The second time, prompts begin with what the first ones left.
            for answer in [engine.submit(*case) for case in cases]:
                answer.result(60)
        assert engine.scheduler.reused_tokens > 0
    thread.join(60)
    assert not thread.is_alive()
    led = engine.scheduler._device._state
    for own, other in zip(jax.tree.leaves(device._state), jax.tree.leaves(led), strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_follower_notices_that_the_leader_has_ended(follower):
    device, following, connection = follower
    connection.close()
    with pytest.raises(GrinqhError, match="process 0 has ended"):
        following.follow(device)
