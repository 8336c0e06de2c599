"""Short answers of the bundled model read the bits that were asked for."""

import numpy as np
import pytest
from batch import Batch

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding.dial import layer_shares
from grinqh_jax.decoding.generator import Generator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

PROMPTS = [
    "Hi",
    "A",
    "Tell me a story.",
    "User: What is a ship?\nAssistant:",
    "Question: There are 7 tables in the museum. Each holds 11 boxes. How many boxes are there?\nAnswer:",
    "Question: Quinn has 89 cups and gives 21 of them to Finn. How many cups does Quinn have?\nAnswer:",
    "The old house stood at the end of the lane, and nobody had lived in it since the spring of that year. ",
    "The `std::vector` class template is a sequence container. Its elements are stored contiguously, so ",
]
ANSWER = 20


@pytest.fixture(scope="module")
def bundled() -> Generator:
    return Generator.load(str(BUNDLED_MODEL))


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_twenty_tokens_read_the_wanted_bits(bundled, bits, temperature):
    prompts = [bundled.tokenizer.encode(prompt) for prompt in PROMPTS]
    batch = Batch(bundled, prompts, bits=bits, max_tokens=ANSWER, max_context=128, temperature=temperature)
    batch.run()
    realised = np.array([(read @ layer_shares(bundled.model.config)).mean() for read in batch.bits])
    assert abs(realised.mean() - bits) < 0.1
    assert np.abs(realised - bits).max() < 0.2
