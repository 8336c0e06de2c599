"""Log-probabilities of tokens in the shapes of the two endpoints."""

import codecs
from collections.abc import Sequence
from typing import Any

from grinqh_jax.serving.answer import TokenLogprob
from grinqh_jax.text.tokenizer import Tokenizer

Logprob = TokenLogprob | tuple[int, None, None]
"""Token, log-probability and alternatives. The first token of a prompt has neither."""


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the field ``logprobs`` of a choice of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        known = tokenizer.token_bytes(token)
        return {
            "token": tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": None if known is None else list(known),
        }

    content = [
        entry(each.token, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


class TextOffsets:
    """Positions of the tokens of a text, which may arrive in parts, in characters."""

    def __init__(self, tokenizer: Tokenizer, echo: str):
        """Starts at the beginning of a text.

        Args:
          tokenizer: Tokenizer of the model.
          echo: Beginning of the text that the client has sent. It alone may show special tokens.
        """
        self._tokenizer = tokenizer
        self._echo = echo
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def next(self, token: int) -> int:
        """Returns the position of the next token, or that of the character of which it is a later part."""
        position, text = self._end, self._tokenizer.token_text(token)
        if not self._tokenizer.decode([token]):
            self._end += len(text) if self._echo.startswith(text, position) else 0
        elif (known := self._tokenizer.token_bytes(token)) is None:
            self._end += len(text)
        else:
            self._end += len(self._characters.decode(known))
        return position


def completion_logprobs(
    tokens: Sequence[Logprob], tokenizer: Tokenizer, offsets: TextOffsets, alternatives: bool
) -> dict[str, Any]:
    """Returns the field ``logprobs`` of a choice of a text completion.

    Args:
      tokens: Tokens with their log-probabilities.
      tokenizer: Tokenizer of the model.
      offsets: Positions of the tokens from the first of ``tokens`` on.
      alternatives: Whether to list the most likely tokens, and with them the token itself.
    """

    def alternative(token: int, logprob: float | None, top: list[tuple[int, float]] | None) -> Any:
        if top is None:
            return None
        return {_name(each, tokenizer): value for each, value in (*top, (token, logprob))}

    return {
        "tokens": [_name(token, tokenizer) for token, _, _ in tokens],
        "token_logprobs": [logprob for _, logprob, _ in tokens],
        "top_logprobs": [alternative(*each) for each in tokens] if alternatives else None,
        "text_offset": [offsets.next(token) for token, _, _ in tokens],
    }


def _name(token: int, tokenizer: Tokenizer) -> str:
    r"""Returns the text of a token, or ``bytes:\xf0\x9f`` for a part of a character."""
    text = tokenizer.token_text(token)
    known = tokenizer.token_bytes(token) if "\ufffd" in text else None
    return text if known is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)
