"""The verb ``lm-eval`` where lm-evaluation-harness is not installed."""

import sys

from grinqh_jax.cli import lm_eval as harness_command


def test_without_the_harness_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert harness_command.main(["--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: lm-evaluation-harness is not installed")
    assert "pip install 'grinqh-jax[eval]'" in error
    assert error.count("\n") == 1
    assert harness_command.main(["--help"]) == 0
    assert "--model grinqh" in capsys.readouterr().out
