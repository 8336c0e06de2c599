"""When the vocabulary of grammars is converted, and what happens without llguidance."""

import sys

import pytest

from grinqh_jax.errors import UsageError
from grinqh_jax.serving.grammar import Grammars


def test_a_prepared_vocabulary_is_not_converted_again(one_layer_generator, monkeypatch):
    grammars = Grammars(one_layer_generator)
    grammars.prepare()
    with monkeypatch.context() as patch:
        patch.setattr("llguidance.LLTokenizer", None)  # A conversion would fail.
        grammar = grammars.of_schema({"type": "boolean"})
    assert grammar.allowed().any()


def test_without_llguidance_only_grammars_fail(one_layer_generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(one_layer_generator)
    grammars.prepare()
    with pytest.raises(UsageError, match=r"schemas need llguidance; install it: pip install"):
        grammars.of_schema({"type": "boolean"})
