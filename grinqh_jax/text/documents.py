"""Texts to measure and calibrate on: a text file, or JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grinqh_jax.errors import UsageError

Record = TypeVar("Record")


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one) or of a ``.jsonl`` file (one a line).

    A record holds its text under ``text``, or a task under ``question`` and ``answer``, which becomes
    ``Question: ...`` and, on the next line, ``Answer: ...``.

    Raises:
      UsageError: the file cannot be read, is not UTF-8, holds no text, or has bad records; names all
        their lines.
    """
    if path.suffix == ".jsonl":
        documents = read_records(path, _document, "a string under text, or under question and answer")
    else:
        documents = [_read_text(path)]
    if not any(document.strip() for document in documents):
        raise UsageError(f"{path} holds no text")
    return documents


def read_records(path: Path, parse: Callable[[Any], Record | None], expected: str) -> list[Record]:
    """What ``parse`` makes of every line of a JSON lines file; empty lines are passed over.

    Args:
      path: of the file.
      parse: from the parsed line; None means that it is not ``expected``.
      expected: what an object should have, for the message.

    Raises:
      UsageError: the file cannot be read, is not UTF-8, or has bad records; names all their lines.
    """
    records, bad = [], []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            record = _parsed(line, parse)
            records += [] if record is None else [record]
            bad += [str(number)] if record is None else []
    if bad:
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise UsageError(f"{path}: line {', '.join(bad[:20])}{more}: expected a JSON object with {expected}")
    return records


def _parsed(line: str, parse: Callable[[Any], Record | None]) -> Record | None:
    try:
        return parse(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start}") from None


def _document(record: Any) -> str | None:
    match record:
        case {"text": str(text)}:
            return text
        case {"question": str(question), "answer": str(answer)}:
            return f"Question: {question}\nAnswer: {answer}"
    return None
