"""Decodes tokens one by one into exactly the text that ``Tokenizer.decode`` gives for all of them."""

import tokenizers

_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens as they arrive, and holds back text that later tokens can change.

    Later tokens can change an incomplete character at the end, and a run of byte tokens (``<0x41>``), because
    a byte fallback decoder replaces a whole run by U+FFFD if any part of it is not UTF-8.

    For each token the stream decodes only a window of the last tokens, not the whole text. The window starts
    with a token whose text is complete, because some decoders strip the blank before the first token.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._window: list[int] = []
        self._emitted = 0  # number of characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes, possibly ``""``."""
        piece = self._backend.id_to_token(token)
        if piece is None or piece in self._special:
            return ""  # decoding skips it
        self._window.append(token)
        if _is_byte(piece):
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):  # maybe the start of a character
            return self._emit(text[:-1])
        completed = self._emit(text)
        if piece:
            self._window = [token]
            self._emitted = len(self._decode(self._window))
        return completed

    def flush(self) -> str:
        """Returns the text still held back; bytes that do not form a character become U+FFFD."""
        return self._emit(self._decode(self._window))

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=True)

    def _emit(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
