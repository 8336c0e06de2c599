"""Reads text from the command line and from standard input."""

import sys

from grinqh_jax.text.unicode import decode

STANDARD_INPUT = "standard input"


def read_prompt(text: str) -> str:
    """Returns the prompt given with ``--prompt``: the text itself, or all of standard input for ``-``.

    Raises:
      UsageError: the prompt is not UTF-8.
    """
    if text == "-":
        return decode(sys.stdin.buffer.read(), STANDARD_INPUT)
    return argument(text, "the prompt")


def argument(text: str, name: str) -> str:
    """Returns a text argument of the command line. Raises UsageError if it is not UTF-8."""
    # Python turns bytes of the command line that are not UTF-8 into lone surrogates.
    return decode(text.encode("utf-8", "surrogateescape"), name)
