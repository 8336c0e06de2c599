"""Reading JSON files that may be damaged, and writing them."""

import json
from pathlib import Path
from typing import Any

from grinqh_jax.errors import CheckpointError

_LARGEST_JSON = 1 << 28


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
      CheckpointError: it is missing, not a regular file, larger than 256 MiB, not UTF-8, or not JSON
        that Python can hold.
    """
    try:
        # A pipe or a device in a file's place would block open() for ever.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(
                f"{path} is too large ({path.stat().st_size} bytes) to be what it should be"
            )
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
      CheckpointError: as of ``read_json``; or it holds anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON. NaN and Inf are a ValueError, as in the JSON standard."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
