"""Documents for evaluation and calibration, read from text files or JSON lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grinqh_jax.errors import UsageError
from grinqh_jax.text.unicode import decode, lone_surrogate

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
        documents = read_records(path, record_text, "a string under text, or under question and answer")
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
      UsageError: The file cannot be read, is not UTF-8, or has bad records, or a string holds half of a
        surrogate pair. The message lists their lines.
    """
    records, bad_lines, cut_lines = [], [], []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        value = _parse_json(line)
        if "\\u" in line and lone_surrogate(json.dumps(value, ensure_ascii=False)) is not None:
            cut_lines.append(number)
        elif (record := parse(value)) is None:
            bad_lines.append(number)
        else:
            records.append(record)
    problems = [f"line {_listed(bad_lines)}: expected a JSON object with {expected}"] if bad_lines else []
    if cut_lines:
        problems.append(
            f"line {_listed(cut_lines)}: half of a surrogate pair, such as \\ud83d, is not text; remove it"
        )
    if problems:
        raise UsageError(f"{path}: {'; '.join(problems)}")
    return records


def _listed(lines: list[int]) -> str:
    listed = ", ".join(map(str, lines[:_MAX_LISTED_LINES]))
    return listed + (f" and {len(lines) - _MAX_LISTED_LINES} more" if len(lines) > _MAX_LISTED_LINES else "")


def _parse_json(line: str) -> Any:
    """Parses a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    return decode(data, str(path))


def record_text(record: Any) -> str | None:
    """Returns the text of a record (see ``read_documents``), or None if it has none."""
    match record:
        case {"text": str(text)}:
            return text
        case {"question": str(question), "answer": str(answer)}:
            return f"Question: {question}\nAnswer: {answer}"
    return None
