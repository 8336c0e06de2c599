"""Decides whether ``tokenizer.json`` alone is the tokenizer that transformers 5 loads from a directory.

transformers merges ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` into
``tokenizer.json``. Some tokenizer classes discard its pipeline (normalizer, pre-tokenizer, model, decoder)
and build another one. In most directories all files agree. There the ``tokenizers`` library alone gives the
same tokens, and saves the seconds that importing transformers takes. Any key or value that is not known to be
neutral counts as a difference.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from grinqh_jax.errors import CheckpointError
from grinqh_jax.json_files import read_json

_KEEP_PIPELINE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that use the pipeline of ``tokenizer.json``."""

_SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")

_NEUTRAL_KEYS = frozenset(
    {
        *("tokenizer_class", "processor_class", "name_or_path", "backend", "is_local", "local_files_only"),
        *("model_max_length", "max_length", "truncation_side", "truncation_strategy", "stride"),
        *("padding_side", "pad_to_multiple_of", "pad_token_type_id", "model_input_names"),
        *("add_bos_token", "add_eos_token"),  # dropped by transformers where tokenizer.json exists
        *("chat_template", "clean_up_tokenization_spaces", "errors", "legacy", "sp_model_kwargs"),
        *("use_default_system_prompt", "spaces_between_special_tokens", "response_schema"),
    }
)
"""Keys of ``tokenizer_config.json`` that change neither tokens nor text."""

_QWEN2_PATTERN_SHA256 = "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e"
"""SHA-256 of the regular expression that transformers' Qwen2Tokenizer splits text by."""

_QWEN2_DEFAULT = "<|endoftext|>"
"""Default of Qwen2Tokenizer's end, padding and unknown tokens."""


def tokenizer_json_suffices(directory: Path, backend: tokenizers.Tokenizer) -> bool:
    """Returns whether transformers 5 gives the tokens of ``tokenizer.json``, loaded as ``backend``.

    Raises:
      CheckpointError: ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` or
        ``config.json`` is not JSON with an object.
    """
    config = _object(directory / "tokenizer_config.json")
    special_tokens = _object(directory / "special_tokens_map.json")
    vocabulary = _object(directory / "added_tokens.json")
    added = backend.get_added_tokens_decoder()
    if not all(_is_neutral(key, value) for key, value in config.items()):
        return False
    if not all(_is_token_key(key) for key in special_tokens):
        return False
    declared = config.get("added_tokens_decoder")
    if declared is not None and not _same_tokens(declared, added):
        return False
    ids = {token.content: number for number, token in added.items()}
    if any(ids.get(content) != number for content, number in vocabulary.items()):
        return False
    named = [*_named_tokens(config), *_named_tokens(special_tokens)]
    if not all(_is_added(token, added.get(ids.get(_content(token), -1))) for token in named):
        return False
    model = _object(directory / "config.json")
    named_tokens = [added[ids[_content(token)]] for token in named]
    return _pipeline_is_kept(directory, backend, config, model, named_tokens, declared)


def _pipeline_is_kept(
    directory: Path,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    named: list[tokenizers.AddedToken],
    declared: Mapping[str, Any] | None,
) -> bool:
    """Whether the tokenizer class that transformers chooses keeps the pipeline of ``tokenizer.json``.

    Args:
      directory: Directory of the checkpoint.
      backend: The loaded ``tokenizer.json``.
      config: Contents of ``tokenizer_config.json``.
      model: Contents of ``config.json``.
      named: Added tokens that have a role, such as ``eos_token``.
      declared: ``added_tokens_decoder`` of ``tokenizer_config.json``, or None.
    """
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name in _KEEP_PIPELINE:
        return True
    if name is None and model.get("model_type") == "llama":
        return True
    if name in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return b'"ByteLevel"' in (directory / "tokenizer.json").read_bytes()
    if name in ("Qwen2Tokenizer", "Qwen2TokenizerFast") or (
        name is None and model.get("model_type") == "qwen3"
    ):
        added = backend.get_added_tokens_decoder()
        special = [t for t in added.values() if t.content == _QWEN2_DEFAULT] + named
        return (
            _is_qwen2_pipeline(backend)
            and any(t.content == _QWEN2_DEFAULT for t in special)
            and all(
                t.special and not (t.normalized or t.lstrip or t.rstrip or t.single_word) for t in special
            )
            and (declared is None or len(declared) == len(added))
        )
    return False


def _is_qwen2_pipeline(backend: tokenizers.Tokenizer) -> bool:
    """Whether the pipeline is the one that transformers' Qwen2Tokenizer builds."""
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    options = (model.dropout, model.unk_token, model.fuse_unk, model.byte_fallback, model.ignore_merges)
    affixes = (model.continuing_subword_prefix, model.end_of_word_suffix)
    if any(options) or any(affixes):
        return False
    match _state(backend.normalizer), _state(backend.decoder), _state(backend.pre_tokenizer):
        case (
            {"type": "NFC"},
            {"type": "ByteLevel"},
            {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": str(pattern)},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
        ):
            return hashlib.sha256(pattern.encode()).hexdigest() == _QWEN2_PATTERN_SHA256
    return False


def _state(component: Any) -> Any:
    """Returns the JSON description of a component of the pipeline, or None."""
    return None if component is None else json.loads(component.__getstate__())


def _object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if the file does not exist."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _is_token_key(key: str) -> bool:
    """Whether a key names tokens with a role."""
    return key.endswith("_token") or key in _SPECIAL_TOKEN_LISTS


def _is_neutral(key: str, value: Any) -> bool:
    """Whether an entry of ``tokenizer_config.json`` changes nothing, or is compared elsewhere."""
    if key == "add_prefix_space":
        return not value
    return key in _NEUTRAL_KEYS or key == "added_tokens_decoder" or _is_token_key(key) or value is None


def _named_tokens(values: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the tokens that have a role, such as ``eos_token``, and the additional special tokens."""
    for key, value in values.items():
        if not _is_token_key(key) or value is None or isinstance(value, bool):
            continue  # add_bos_token and the like are switches
        if isinstance(value, list):
            yield from value
        elif isinstance(value, dict) and key in _SPECIAL_TOKEN_LISTS:
            yield from value.values()
        else:
            yield value


def _content(token: Any) -> Any:
    """Returns the text of a token, which is a string or an object with ``content``; None if malformed."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Properties of an added token."""


def _is_added(token: Any, added: tokenizers.AddedToken | None) -> bool:
    """Whether ``added`` is a special token with the flags that ``token`` states. A string states none."""
    if added is None or not added.special:
        return False
    stated = token if isinstance(token, dict) else {}
    return all(bool(stated[flag]) == getattr(added, flag) for flag in _FLAGS if flag in stated)


def _same_tokens(declared: Any, added: Mapping[int, tokenizers.AddedToken]) -> bool:
    """Whether every token of ``added_tokens_decoder`` is in ``tokenizer.json`` with the same id and flags."""
    if not isinstance(declared, dict):
        return False
    for number, token in declared.items():
        known = added.get(int(number)) if str(number).isdecimal() else None
        if known is None or not isinstance(token, dict) or token.get("content") != known.content:
            return False
        if any(bool(token.get(flag, False)) != getattr(known, flag) for flag in _FLAGS):
            return False
    return True
