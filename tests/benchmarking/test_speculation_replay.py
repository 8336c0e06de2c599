"""The replay of ``benchmarks/speculation.py``."""

import sys
from pathlib import Path

import pytest

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.text.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "speculation", raising=False)
    import speculation

    return speculation


def test_a_copied_text_is_drafted_and_a_new_one_is_not(benchmark):
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    document = " ".join(f"The {word} stood near the {word} gate." for word in ("old", "blue", "tall", "low"))
    copied = benchmark.replay(tokenizer, f"Copy: {document}\n\n", document, in_blocks=False)
    tokens = len(tokenizer.encode(document, special_tokens=False))
    for most, counts in copied.items():
        assert counts["steps"] + counts["accepted"] == tokens - 1
        assert counts["drafted"] <= most * counts["drafting"]
    assert copied[0] == {"steps": tokens - 1, "drafting": 0, "drafted": 0, "accepted": 0}
    assert copied[7]["steps"] < copied[3]["steps"] < copied[1]["steps"] < tokens / 1.5
    new = benchmark.replay(tokenizer, "Once", " upon a time", in_blocks=False)
    assert new[7]["accepted"] == 0
    blocks = benchmark.replay(tokenizer, f"Copy: {document}\n\n", document, in_blocks=True)
    assert blocks[15]["steps"] >= copied[15]["steps"]


def test_there_are_texts_of_three_kinds(benchmark):
    kinds = [kind for kind, _, _ in benchmark.texts()]
    assert set(kinds) == {"free", "quotes", "edits"}
    assert min(kinds.count(kind) for kind in set(kinds)) >= 5
