"""Runs verbs of the command line in this process, with their streams."""

import io
import sys
from types import SimpleNamespace


def run(capsys, main, *argv) -> SimpleNamespace:
    """Exit code, stdout and stderr of a verb that runs in this process."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as exit:  # raised by argparse
        code = exit.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def assert_refused(result, *texts: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert [text for text in texts if text not in result.err] == []
