"""Special tokens and sampling defaults from a checkpoint's ``generation_config.json``."""

import dataclasses
from pathlib import Path
from typing import Any

from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Generation defaults of a model.

    Attributes:
      eos_tokens: Tokens that end a text.
      bos_token: Token that begins a text, or None.
      temperature, top_k, top_p, min_p: Sampling parameters (see ``sampling.Sampling``). Greedy unless the
        file sets ``do_sample``. Filters that the file does not name are off.
    """

    eos_tokens: tuple[int, ...] = ()
    bos_token: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def load(cls, directory: Path) -> "GenerationConfig":
        """Reads ``generation_config.json``, and takes token ids that it lacks from ``config.json``.

        Raises:
          CheckpointError: A file is damaged or values are malformed. The message names all of them.
        """
        own, model = (_read(directory / name) for name in ("generation_config.json", "config.json"))
        problems: list[str] = []

        def token_ids(key: str) -> tuple[int, ...]:
            value = own.get(key, model.get(key))
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                problems.append(f"{key} is {value!r}, expected a token id or a list of them")
                return ()
            return tuple(ids)

        def number(key: str, default: float, least: float, most: float) -> Any:
            value = own.get(key)
            if value is None:
                return default
            if type(value) not in (int, float) or not least <= value <= most:
                problems.append(f"{key} is {value!r}, expected a number from {least:g} to {most:g}")
                return default
            return value

        filters = {
            "temperature": number("temperature", 1.0, 0.0, float("inf")),
            "top_k": int(number("top_k", 0, 0, 2**31 - 1)),
            "top_p": number("top_p", 1.0, 1e-6, 1.0),
            "min_p": number("min_p", 0.0, 0.0, 1.0),
        }
        eos, bos = token_ids("eos_token_id"), token_ids("bos_token_id")
        if problems:
            raise CheckpointError(f"{directory / 'generation_config.json'}: " + "; ".join(problems))
        return cls(
            eos_tokens=eos, bos_token=bos[0] if bos else None, **(filters if own.get("do_sample") else {})
        )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
