"""The verb ``lm-eval`` without lm-evaluation-harness."""

import sys

from grinqh_jax.cli import lm_eval


def test_a_missing_harness_is_named_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert lm_eval.main(["--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: lm-evaluation-harness is not installed")
    assert "pip install 'grinqh-jax[eval]'" in error
    assert error.count("\n") == 1
    assert lm_eval.main(["--help"]) == 0
    assert "--model grinqh" in capsys.readouterr().out
