"""Greedy texts of trained models with a dial that is held: the same with drafts and without."""

import numpy as np
import pytest
from batch import Batch

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.load_speculation import speculation_of
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import Speculation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs"), pytest.mark.timeout(900)]

PROMPTS = {"bundled": 50, "qwen3-32m": 8}
"""Number of prompts at each of four settings. The larger model takes five times as long for each."""

PROMPT_TOKENS, ANSWER_TOKENS = 48, 40


def prompts(generator: Generator, count: int) -> list[list[int]]:
    """Pieces of the bundled text. Each begins again at its end, so that lookup has drafts."""
    from checkpoints_tools.calibration.text import BUNDLED_TEXT

    tokens = generator.tokenizer.encode(BUNDLED_TEXT.read_text(encoding="utf-8")[:60_000])
    starts = np.linspace(0, len(tokens) - PROMPT_TOKENS, count).astype(int)
    pieces = [tokens[start : start + PROMPT_TOKENS - 8] for start in starts]
    return [piece + piece[:8] for piece in pieces]


def loops(tokens: list[int]) -> bool:
    """Whether a text ends in a loop."""
    end = tokens[-24:]
    return any(end[period:] == end[:-period] for period in range(1, 9))


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 8.0])
@pytest.mark.parametrize("name", ["bundled", "qwen3-32m"])
def test_greedy_texts_are_the_same_with_drafts(name, bits, request):
    generator = Generator.load(
        BUNDLED_MODEL if name == "bundled" else request.getfixturevalue("converted_32m")
    )
    generator.holds_dial = True

    def decoded(speculation=None):
        sizes = {"max_tokens": ANSWER_TOKENS, "max_context": 128, "slots": 2}
        batch = Batch(
            generator, prompts(generator, PROMPTS[name]), bits=bits, speculation=speculation, **sizes
        )
        batch.run()
        return batch

    plain, accepted = decoded(), 0
    drafters = [Speculation(PromptLookup(), always=True)]
    if bits > 3:
        setting = SpeculationSetting("self", bits=2.0)
        drafters.append(Speculation(speculation_of(setting, generator).drafter, always=True))
    for speculation in drafters:
        drafted = decoded(speculation)
        different = [
            i for i, (one, other) in enumerate(zip(plain.tokens, drafted.tokens, strict=True)) if one != other
        ]
        assert different == []
        accepted += sum(row.speculation.accepted for row in drafted.rows)
    assert accepted > 2 * PROMPTS[name]
    assert sum(not loops(tokens) for tokens in plain.tokens) > PROMPTS[name] // 2
