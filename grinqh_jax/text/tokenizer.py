"""Converts text to tokens and back with a checkpoint's tokenizer files.

The tokens are those of transformers 5 on the same directory. The ``tokenizers`` library reads
``tokenizer.json`` directly, as transformers does internally. transformers takes seconds to import, so it is
imported only for chat templates and where ``tokenizer.json`` does not say everything (``tokenizer_files``).
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from grinqh_jax.companions import CHAT_TEMPLATES
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.json_files import read_json
from grinqh_jax.text.stream import TextStream
from grinqh_jax.text.tokenizer_files import tokenizer_json_suffices
from grinqh_jax.text.unicode import check

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that hold a vocabulary. Without any of them transformers returns an empty tokenizer."""

Message = Mapping[str, Any]
"""A turn of a conversation: ``{"role": "system" | "user" | "assistant", "content": text}``, and other fields
that the chat template reads, such as ``tool_calls``."""


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, directory: Path):
        self._backend = backend
        # A training run leaves these in tokenizer.json. transformers ignores them when it encodes a text.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._directory = directory
        self._transformers: Any = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Loads the tokenizer in a checkpoint's directory.

        Raises:
          CheckpointError: The directory has no tokenizer, or the tokenizer is damaged.
        """
        directory = Path(directory)
        if not any((directory / name).is_file() for name in VOCABULARIES):
            raise CheckpointError(
                f"{directory} has no tokenizer ({', '.join(VOCABULARIES)}); copy the original model's"
            )
        path = directory / "tokenizer.json"
        if not path.exists():
            return cls(_load_transformers(directory).backend_tokenizer, directory)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise CheckpointError(f"{path} is not a tokenizer ({_line(error)}); copy it again") from None
        if not tokenizer_json_suffices(directory, backend):
            backend = _load_transformers(directory).backend_tokenizer
        return cls(backend, directory)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Returns the tokens of ``text``, by default with surrounding special tokens such as BOS.

        Raises:
          UsageError: ``text`` holds half of a surrogate pair, which no UTF-8 text does.
        """
        check(text, "the text")
        # ``encode`` would keep Python's lock, 50 ms for 30,000 tokens, and an engine would stop meanwhile.
        return self._backend.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids

    def decode(self, tokens: Sequence[int], *, special_tokens: bool = False) -> str:
        """Returns the text of ``tokens``, by default without special tokens. Bytes that are not UTF-8 become
        U+FFFD."""
        return self._backend.decode(list(tokens), skip_special_tokens=not special_tokens)

    def token_text(self, token: int) -> str:
        """Returns the text of one token, special or not. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode([token], special_tokens=True)

    def token_bytes(self, token: int) -> bytes | None:
        """Returns the bytes of one token, which may be part of a character; None if they are unknown."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._backend.id_to_token(token) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        byte_of = _bytes_of_characters()
        if piece and all(character in byte_of for character in piece):
            return bytes(byte_of[character] for character in piece)
        return None

    def json_text(self) -> str:
        """Returns the tokenizer in the format of ``tokenizer.json``."""
        return self._backend.to_str()

    @property
    def bos_text(self) -> str | None:
        """Text of the token that ``encode`` puts before every text, or None if there is none."""
        alone = self._backend.encode("").ids
        begun = self._backend.encode("a").ids
        return self._backend.id_to_token(alone[0]) if alone and begun[:1] == alone[:1] else None

    @functools.cached_property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template, which ``chat`` needs. Files are read the first time."""
        if (self._directory / "chat_template.jinja").exists():
            return True
        if any((self._directory / CHAT_TEMPLATES).glob("*.jinja")):
            return True
        path = self._directory / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        return isinstance(config, dict) and bool(config.get("chat_template"))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation in the model's chat format.

        They end where the next answer begins.

        Raises:
          UsageError: ``chat_text`` raises it.
        """
        return self.encode(self.chat_text(messages), special_tokens=False)

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation with its special tokens.

        Args:
          messages: Turns of the conversation, oldest first.
          template: Name of one of several chat templates; None selects the default.
          add_generation_prompt: Append the prefix of the assistant's next answer.
          tools: Functions that the model may call, in OpenAI's schema.
          variables: Other variables of the template, such as ``enable_thinking``.

        Raises:
          UsageError: The tokenizer has no chat template or none of that name, or the template rejects these
            messages.
        """
        source = self.chat_template(template)
        try:
            return self._with_transformers().apply_chat_template(
                list(messages),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools),
                **(variables or {}),
            )
        except Exception as error:  # a template is a program and can raise anything
            raise UsageError(f"{self._directory}: the chat template fails: {_line(error)}") from None

    def chat_template(self, name: str | None = None) -> str:
        """Returns the source of a chat template: the one of that name, or the default.

        Raises:
          UsageError: The tokenizer has no such chat template.
        """
        if not self.has_chat_template:
            raise UsageError(
                f"{self._directory}: the tokenizer has no chat template; use a chat model or a plain prompt"
            )
        templates = self._with_transformers().chat_template
        if isinstance(templates, str):
            templates = {"default": templates}
        if (name or "default") not in templates:
            raise UsageError(
                f"{self._directory}: no chat template is named {name or 'default'} (there are: "
                f"{', '.join(templates)})"
            )
        return templates[name or "default"]

    def _with_transformers(self) -> Any:
        if self._transformers is None:
            self._transformers = _load_transformers(self._directory)
        return self._transformers

    def stream(self) -> "TextStream":
        """Returns a decoder for tokens that arrive one by one."""
        return TextStream(self._backend)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary means.

    Bytes that Latin-1 prints are themselves; the others follow from U+0100 on (GPT-2's ``bytes_to_unicode``).
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _load_transformers(directory: Path) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warning that torch is missing
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, errors of tokenizers
        raise CheckpointError(f"{directory}: cannot load the tokenizer: {_line(error)}") from None


def _line(error: Exception) -> str:
    """Returns an error's message on one line, at most 300 characters long."""
    return f"{' '.join(str(error).split()):.300}"
