"""The replay of ``benchmarks/speculation.py``, and the speeds that follow from it."""

from pathlib import Path

import numpy as np
import pytest

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.decoding.slots.step_shapes import StepShape
from grinqh_jax.text.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = [StepShape(1, 0), StepShape(1, 7)]


@pytest.fixture
def replay(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speculation_replay

    return speculation_replay


@pytest.fixture
def speculation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speculation

    return speculation


def document() -> str:
    return " ".join(f"The {word} stood near the {word} gate." for word in ("old", "blue", "tall", "low"))


def test_a_copied_text_is_drafted_and_a_new_one_is_not(replay):
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    text = replay.Replay.of(tokenizer, f"Copy: {document()}\n\n", document())
    copied = replay.counted(text, in_blocks=False)
    tokens = len(tokenizer.encode(document(), special_tokens=False))
    for most, counts in copied.items():
        assert counts["steps"] + counts["accepted"] == tokens - 1
        assert counts["drafted"] <= most * counts["drafting"]
    assert copied[0] == {"steps": tokens - 1, "drafting": 0, "drafted": 0, "accepted": 0}
    assert copied[7]["steps"] < copied[3]["steps"] < copied[1]["steps"] < tokens / 1.5
    new = replay.Replay.of(tokenizer, "Once", " upon a time")
    assert replay.counted(new, in_blocks=False)[7]["accepted"] == 0
    assert replay.counted(text, in_blocks=True)[15]["steps"] >= copied[15]["steps"]


def test_there_are_texts_of_three_kinds(replay):
    kinds = [kind for kind, _, _ in replay.texts()]
    assert set(kinds) == {"free", "quotes", "edits"}
    assert min(kinds.count(kind) for kind in set(kinds)) >= 5


def always(replay, tokens: int, accepts: bool):
    """A text whose tokens are all drafted, rightly or wrongly."""
    answer = np.arange(tokens)
    return replay.Replay(answer, [answer[i : i + 15] + (not accepts) for i in range(1, tokens)])


def test_the_chosen_drafts_cost_little_where_none_is_accepted(replay):
    """Each row costs a fifth of a step."""
    tokens, chunk = 16 * 64 + 1, 8

    def seconds(shape, drafting):
        return 1 + 0.2 * shape.drafts * drafting

    def plain_over(text):
        return (tokens - 1) / replay.chosen_seconds([text], SHAPES, chunk, seconds)

    # 16 tokens take two steps with seven drafts, which cost 2.4 plain ones each.
    assert 2.9 < plain_over(always(replay, tokens, accepts=True)) < 16 / (2 * 2.4)
    # Two chunks of 4 steps are launched before the first arrives. A probe has 4 steps, too.
    spent = tokens - 1 + 8 * 1.4 + (tokens / 8 / 33) * 4 * 1.4
    assert (tokens - 1) / spent - 0.01 < plain_over(always(replay, tokens, accepts=False)) < 0.985


def test_speeds_are_those_of_the_mean_step(speculation):
    case = {"bits": 3.0, "context": 64, "texts": 1}
    rows = [case | {"drafter": "off", "drafts": 0, "verified": 0, "us_per_step": 100.0}]
    for drafts, verified, time in ((3, 3, 160.0), (3, 0, 120.0), (0, 0, 104.0)):
        rows.append(case | {"drafter": "lookup", "drafts": drafts, "verified": verified, "us_per_step": time})
    rows.append(case | {"drafter": "self", "drafts": 3, "verified": 3, "us_per_step": 900.0})
    text = {"kind": "edits", "steps": 10, "drafting": 5, "accepted": 11, "tokens_per_step": 2.1}
    plain = text | {"drafts": 0, "drafting": 0, "accepted": 0, "tokens_per_step": 1.0}
    speeds = speculation.speeds([plain, text | {"drafts": 3}, text | {"drafts": 7}], rows)
    assert {row["drafts"]: row["speed"] for row in speeds} == {
        3: pytest.approx(2.1 * 100 / 140),
        0: round(100 / 104, 3),
    }
