"""Special tokens and sampling defaults from a checkpoint's ``generation_config.json``."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from grinqh_jax.decoding.penalties import NEUTRAL
from grinqh_jax.decoding.request import RANGES
from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_object
from grinqh_jax.ranges import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Generation defaults of a model.

    Attributes:
      eos_tokens: Tokens that end a text.
      bos_token: Token that begins a text, or None.
      temperature, top_k, top_p, min_p: Sampling parameters (see ``sampling.Sampling``). Greedy unless the
        file sets ``do_sample``. Filters that the file does not name are off.
      repetition_penalty, presence_penalty, frequency_penalty: Penalties on repeated tokens (see
        ``penalties.Penalties``), for greedy texts, too.
      ignored: Keys of the file, with their values, that would change the text in transformers but are not
        implemented.
    """

    eos_tokens: tuple[int, ...] = ()
    bos_token: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignored: tuple[str, ...] = ()

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

        def number(key: str, default: float, accepted: Range) -> Any:
            value = own.get(key)
            if value is None:
                return default
            if type(value) not in (int, float) or value not in accepted:
                problems.append(f"{key} is {value!r}, expected a number, {accepted}")
                return default
            return value

        filters = {
            "temperature": number("temperature", 1.0, Range(0, math.inf)),
            "top_k": int(number("top_k", 0, RANGES["top_k"])),
            "top_p": number("top_p", 1.0, RANGES["top_p"]),
            "min_p": number("min_p", 0.0, RANGES["min_p"]),
        }
        penalties = {name: number(name, NEUTRAL[name], RANGES[name]) for name in NEUTRAL}
        eos, bos = token_ids("eos_token_id"), token_ids("bos_token_id")
        if problems:
            raise CheckpointError(f"{directory / 'generation_config.json'}: " + "; ".join(problems))
        return cls(
            eos_tokens=eos,
            bos_token=bos[0] if bos else None,
            **(filters if own.get("do_sample") else {}),
            **penalties,
            ignored=_ignored(own),
        )


_NOT_IMPLEMENTED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "stop_strings": None,
    "token_healing": False,
}
"""Keys that can change the text in transformers and are not implemented, with the value that changes
nothing."""

_NOT_IMPLEMENTED_SAMPLING = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None}
"""The same for keys that have an effect only with ``do_sample``."""


def _ignored(own: dict[str, Any]) -> tuple[str, ...]:
    neutral = _NOT_IMPLEMENTED | (_NOT_IMPLEMENTED_SAMPLING if own.get("do_sample") else {})
    return tuple(
        f"{key} {own[key]!r:.40}"
        for key, value in neutral.items()
        if own.get(key) is not None and own[key] != value and own[key] not in ([], {})
    )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
