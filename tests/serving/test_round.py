"""What the host gives the device for a request: few programs, and few and small arrays."""

import jax
import pytest

from grinqh_jax.decoding.request import Request

pytestmark = pytest.mark.slow  # It compiles an engine.

PROMPT = list(range(60, 80))
GREEDY = Request(temperature=0.0, max_tokens=9, stop_tokens=())


@pytest.fixture
def given(engine, monkeypatch):
    """Names of the programs, and bytes of the arrays of each transfer, that the engine's device gets."""
    engine.submit(PROMPT, GREEDY).result(60)  # The next request gets the same slot.
    device = engine.scheduler._device
    programs: list[str] = []
    transfers: list[list[int]] = []

    def noted(owner, name, note):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            note(args[0])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(device, "_run", programs.append)
    for owner in (device, device._requests):
        noted(owner, "_put", lambda arrays: transfers.append([a.nbytes for a in jax.tree.leaves(arrays)]))
    # An operation outside the programs would move its operands itself.
    before = jax.config.jax_transfer_guard_host_to_device
    jax.config.update("jax_transfer_guard_host_to_device", "disallow")
    yield programs, transfers
    jax.config.update("jax_transfer_guard_host_to_device", before)


def test_a_request_takes_few_programs_and_three_small_transfers(engine, given):
    programs, transfers = given
    answer = engine.submit(PROMPT, GREEDY)
    answer.result(60)
    assert len(answer.tokens) == 9
    chunks = ["generate"] * programs.count("generate")
    assert programs == ["thresholds", "prefill", "insert", *chunks, "free"]
    assert len(chunks) == 4  # of two steps
    assert len(transfers) == 3  # the prefix, the tokens and the settings
    # No array has an entry for each token of the vocabulary.
    assert max(size for sizes in transfers for size in sizes) < engine._generator.model.config.vocab_size


def test_a_request_with_biases_and_penalties_sends_them(engine, given):
    _, transfers = given
    biased = Request(temperature=0.0, max_tokens=2, logit_bias={70: 4.0}, repetition_penalty=1.3)
    engine.submit(PROMPT, biased).result(60)
    vocabulary = engine._generator.model.config.vocab_size
    sizes = [size for sizes in transfers for size in sizes]
    assert sizes.count(4 * vocabulary) == 1  # biases
    assert sizes.count(vocabulary) == 1  # tokens of the prompt
