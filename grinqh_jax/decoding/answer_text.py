"""The text of an answer: decodes its tokens as they arrive, and ends it at a stop token or a stop string."""

from collections.abc import Collection, Sequence

from grinqh_jax.decoding.stop import StopStrings
from grinqh_jax.text.stream import TextStream


class AnswerText:
    """Decodes tokens into text.

    Attributes:
      stopped: Whether a stop token or a stop string has ended the text.
    """

    def __init__(self, stream: TextStream, stop_strings: Sequence[str], stop_tokens: Collection[int]):
        """Makes an empty text.

        Args:
          stream: Decodes the tokens.
          stop_strings: Strings that end the text and are not part of it.
          stop_tokens: Tokens that end the text.
        """
        self.stopped = False
        self._stream = stream
        self._stop_strings = StopStrings(stop_strings)
        self._stop_tokens = frozenset(stop_tokens)

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Adds tokens up to the first that ends the text.

        Returns:
          Text that later tokens cannot change any more, possibly empty; and the number of tokens added.
        """
        piece = ""
        for count, token in enumerate(tokens):
            if self.stopped:
                return piece, count
            piece += self._stop_strings.push(self._stream.push(token))
            self.stopped = self._stop_strings.met or token in self._stop_tokens
        return piece, len(tokens)

    def flush(self) -> str:
        """Returns the text held back, at the end of the answer."""
        if self._stop_strings.met:
            return ""
        return self._stop_strings.push(self._stream.flush()) + self._stop_strings.flush()
