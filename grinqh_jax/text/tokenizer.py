"""Text to tokens and back, from a checkpoint's tokenizer files.

``tokenizer.json`` is read by the ``tokenizers`` library itself, as transformers does underneath.
transformers, which takes seconds to import, is needed only for chat templates and for old
checkpoints without a ``tokenizer.json``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.json_files import read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Without one of these files transformers makes up an empty tokenizer."""

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": "system" | "user" | "assistant", "content": text}``."""


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, directory: Path):
        self._backend = backend
        self._directory = directory
        self._transformers = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Loads the tokenizer of a checkpoint's directory.

        Raises:
          CheckpointError: there is none, or it is damaged.
        """
        directory = Path(directory)
        if not any((directory / name).is_file() for name in VOCABULARIES):
            raise CheckpointError(
                f"{directory}: there is no tokenizer ({', '.join(VOCABULARIES)}); copy the original model's"
            )
        path = directory / "tokenizer.json"
        if not path.exists():
            return cls(_load_transformers(directory).backend_tokenizer, directory)
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), directory)
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{path} is not a tokenizer ({_line(error)}); copy it again") from None

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around one (such as BOS) by default."""
        return self._backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out, bytes that are not UTF-8 as U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works."""
        if (self._directory / "chat_template.jinja").exists():
            return True
        path = self._directory / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        return isinstance(config, dict) and bool(config.get("chat_template"))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation as the model was trained to see it, ending where the answer begins.

        Raises:
          UsageError: see ``chat_text``.
        """
        return self.encode(self.chat_text(messages), special_tokens=False)

    def chat_text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens and all, by default up to where the answer begins.

        Raises:
          UsageError: the tokenizer has no chat template, or its template refuses these messages.
        """
        if not self.has_chat_template:
            raise UsageError(
                f"{self._directory}: the tokenizer has no chat template; use a chat model or a plain prompt"
            )
        if self._transformers is None:
            self._transformers = _load_transformers(self._directory)
        try:
            return self._transformers.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise UsageError(f"{self._directory}: the chat template fails: {_line(error)}") from None

    def stream(self) -> "TextStream":
        """A decoder for tokens that arrive one by one."""
        return TextStream(self._backend)


class TextStream:
    """Decodes tokens as they come, holding back what is not yet whole characters."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._text = ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none."""
        self._tokens.append(token)
        piece = self._decoder.step(self._backend, token) or ""
        self._text += piece
        return piece

    def flush(self) -> str:
        """The rest at the end: bytes that never became a character, as U+FFFD."""
        whole = self._backend.decode(self._tokens, skip_special_tokens=True)
        rest = whole[len(self._text) :]
        self._text = whole
        return rest


def _load_transformers(directory: Path) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would remark that torch is missing
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # OSError, ValueError, ImportError, and the tokenizers library's own
        raise CheckpointError(f"{directory}: cannot load the tokenizer: {_line(error)}") from None


def _line(error: Exception) -> str:
    """An error's message on one line of bounded length."""
    return f"{' '.join(str(error).split()):.300}"
