"""Stop strings in a stream of text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of the stop strings appears, holding back what may be its beginning.

    Attributes:
      met: whether one has appeared; nothing is passed on from its first character.
    """

    def __init__(self, strings: Sequence[str]):
        self.met = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain not to be part of a stop string, given what has come so far."""
        if self.met:
            return ""
        self._held += text
        found = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            self.met = True
            passed, self._held = self._held[: min(found)], ""
            return passed
        keep = max((self._overlap(string) for string in self._strings), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, string: str) -> int:
        """Length of the longest end of the held text that begins ``string``."""
        longest = min(len(string) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)
