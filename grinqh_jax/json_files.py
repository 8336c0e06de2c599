"""Reads JSON files that may be damaged, and writes JSON files."""

import json
import math
from pathlib import Path
from typing import Any

from grinqh_jax.errors import CheckpointError

_MAX_JSON_BYTES = 1 << 28
"""Size of the largest file that is parsed, so that a damaged one cannot fill the memory."""


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
      CheckpointError: The file is missing, is not a regular file, is larger than 256 MiB, is not UTF-8, or is
        not JSON that Python can represent.
    """
    try:
        # open() would block forever on a pipe or a device.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, at most {_MAX_JSON_BYTES} are accepted")
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad syntax, huge integers
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that holds an object.

    Raises:
      CheckpointError: ``read_json`` raises it, or the file does not hold an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Writes ``value`` as indented JSON.

    Raises:
      ValueError: A number is NaN or infinite, which JSON does not have, and ``allow_nan`` is false. With
        ``allow_nan`` it is written as ``NaN`` or ``Infinity``, which Python and transformers write and read.
    """
    path.write_text(json.dumps(value, indent=2, allow_nan=allow_nan) + "\n", encoding="utf-8")


def json_line(value: Any) -> str:
    """Returns ``value`` as JSON on one line.

    JSON has no number for infinity and NaN. They become the strings ``"Infinity"``, ``"-Infinity"`` and
    ``"NaN"``, which ``float`` reads in Python and ``Number`` in JavaScript.
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Returns ``value`` with strings in place of numbers that are not finite (see ``json_line``)."""
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
    return value
