"""Documents for evaluation and calibration, read from text files or JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grinqh_jax.errors import UsageError

Record = TypeVar("Record")

_MAX_LISTED_LINES = 20


def read_documents(path: Path) -> list[str]:
    """Reads the single document of a text file, or one document per line of a ``.jsonl`` file.

    A record has its text under ``text``, or a task under ``question`` and ``answer``. A task becomes
    ``Question: ...`` and, on the next line, ``Answer: ...``.

    Raises:
      UsageError: The file cannot be read, is not UTF-8, holds no text, or has bad records. The message lists
        the lines of the bad records.
    """
    if path.suffix == ".jsonl":
        documents = read_records(path, _document, "a string under text, or under question and answer")
    else:
        documents = [_read_text(path)]
    if not any(document.strip() for document in documents):
        raise UsageError(f"{path} holds no text")
    return documents


def read_records(path: Path, parse: Callable[[Any], Record | None], expected: str) -> list[Record]:
    """Reads a JSON lines file and parses each line that is not empty.

    Args:
      path: The file.
      parse: Function from a line's JSON value to a record; None marks a bad record.
      expected: Description of a good record for the error message: "expected a JSON object with ...".

    Raises:
      UsageError: The file cannot be read, is not UTF-8, or has bad records. The message lists their lines.
    """
    records, bad_lines = [], []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = _parse_line(line, parse)
        if record is None:
            bad_lines.append(str(number))
        else:
            records.append(record)
    if bad_lines:
        listed = ", ".join(bad_lines[:_MAX_LISTED_LINES])
        if len(bad_lines) > _MAX_LISTED_LINES:
            listed += f" and {len(bad_lines) - _MAX_LISTED_LINES} more"
        raise UsageError(f"{path}: line {listed}: expected a JSON object with {expected}")
    return records


def _parse_line(line: str, parse: Callable[[Any], Record | None]) -> Record | None:
    try:
        return parse(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors write a byte order mark
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
