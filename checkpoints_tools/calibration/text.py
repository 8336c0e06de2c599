"""Calibration text: read, tokenized, cut into windows of one length."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from grinqh_jax.errors import UsageError

DEFAULT_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"
MAX_WINDOW = 1024
_LEAST_TOKENS = 256
_CHARS_PER_TOKEN = 8
"""More than most tokens have: a span of so many characters a token is long enough for its window."""


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one) or of a ``.jsonl`` file (one a line).

    A record holds its text under ``text``, or a task under ``question`` and ``answer``, which is
    written as the evaluator writes it.

    Raises:
      UsageError: the file cannot be read, is empty, or has bad records; names all their lines.
    """
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"--calib {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--calib {path}: not UTF-8 at byte {error.start}") from None
    documents, bad = [content], []
    if path.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                document = _record_text(line)
                bad += [] if document else [str(number)]
                documents += [document] if document else []
    if bad:
        raise UsageError(
            f"--calib {path}: line {', '.join(bad[:20])}{' and more' * (len(bad) > 20)}: expected an object"
            " with a string under text, or under question and answer"
        )
    if not any(document.strip() for document in documents):
        raise UsageError(f"--calib {path}: holds no text")
    return documents


def _record_text(line: str) -> str | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    match record:
        case {"text": str(text)}:
            return text
        case {"question": str(question), "answer": str(answer)}:
            return f"Question: {question}\nAnswer: {answer}"
    return None


def windows(
    text: str, encode: Callable[[str], Sequence[int]], tokens: int, length: int
) -> Int32[np.ndarray, "s t"]:
    """Token windows taken evenly from the whole text.

    Args:
      text: of any length; only spans of it are tokenized.
      encode: text to token ids.
      tokens: how many are wanted; rounded down to whole windows, fewer if the text has fewer.
      length: of a window; shorter if the text, or ``tokens``, is shorter than one.

    Raises:
      UsageError: the text gives fewer than 256 tokens, too few to place thresholds.
    """
    length = min(length, tokens)
    count = max(1, min(tokens // length, len(text) // (_CHARS_PER_TOKEN * length)))
    span = len(text) // count
    limit = 2 * _CHARS_PER_TOKEN * length
    rows = [encode(text[i * span : i * span + min(span, limit)])[:length] for i in range(count)]
    shortest = min(map(len, rows))
    if (total := shortest * count) < _LEAST_TOKENS:
        raise UsageError(
            f"calibration text: {total} tokens of {len(text)} characters, need {_LEAST_TOKENS} or more"
        )
    return np.array([row[:shortest] for row in rows], np.int32)
