"""The trials of ``benchmarks/trials`` replace only names that exist, and give only flags that exist."""

import importlib
import sys
from pathlib import Path

import pytest

TRIALS = Path(__file__).parents[2] / "benchmarks" / "trials"
GROUPS = {
    "bases": "BASES",
    "code_trials": "CODE_TRIALS",
    "gains_trials": "GAINS_TRIALS",
    "refits": "REFITS",
    "roundings": "ROUNDINGS",
    "splits": "SPLITS",
}


@pytest.mark.parametrize("module", GROUPS)
def test_every_change_applies_to_the_product(monkeypatch, module):
    monkeypatch.syspath_prepend(str(TRIALS))
    trials = getattr(importlib.import_module(module), GROUPS[module])
    parser = importlib.import_module("checkpoints_tools.convert.command").parser()
    for trial in trials.values():
        parser.parse_args([*trial.flags, "--model", "model", "--out", "out"])
        with trial.change():  # raises if a replaced attribute does not exist
            pass
    assert len(trials) > 3


def test_the_groups_are_those_of_the_command(monkeypatch):
    monkeypatch.syspath_prepend(str(TRIALS))
    monkeypatch.setattr(sys, "argv", ["trials"])
    source = (TRIALS / "__main__.py").read_text(encoding="utf-8")
    for module, name in GROUPS.items():
        assert f"from {module} import {name}" in source
