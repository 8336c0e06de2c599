"""Stop strings in a stream of text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string appears, and holds back text that may be the start of one.

    Attributes:
      met: Whether a stop string has appeared. Text from its first character on is dropped.
    """

    def __init__(self, strings: Sequence[str]):
        self.met = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Adds text, and returns the text that is certain to be before any stop string."""
        if self.met:
            return ""
        self._held += text
        starts = [start for string in self._strings if (start := self._held.find(string)) >= 0]
        if starts:
            self.met = True
            passed, self._held = self._held[: min(starts)], ""
            return passed
        keep = max((self._overlap(string) for string in self._strings), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """Returns the text held back, at the end of the stream."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, string: str) -> int:
        """Returns the length of the longest suffix of the held text that is a prefix of ``string``."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
