"""Reads text from the command line and from standard input."""

import sys

from grinqh_jax.errors import UsageError
from grinqh_jax.text.unicode import decode

STANDARD_INPUT = "standard input"


def read_prompt(flag: str | None, argument_text: str | None) -> str:
    """Returns the prompt, from the first of: ``--prompt``, the argument, standard input.

    Args:
      flag: Value of ``--prompt``; ``-`` is all of standard input.
      argument_text: The prompt as an argument; ``-`` is all of standard input.

    Raises:
      UsageError: the prompt is given twice, or not at all, or is not UTF-8.
    """
    if flag is not None and argument_text is not None:
        raise UsageError("the prompt is given twice, with --prompt and as an argument; leave one out")
    text = argument_text if flag is None else flag
    if text == "-":
        return decode(sys.stdin.buffer.read(), STANDARD_INPUT)
    if text is not None:
        return argument(text, "the prompt")
    piped = "" if sys.stdin.isatty() else decode(sys.stdin.buffer.read(), STANDARD_INPUT)
    if not piped:
        raise UsageError(
            'no prompt: give one as an argument (grinqh-jax generate "Once upon a time") or on standard input'
        )
    return piped


def argument(text: str, name: str) -> str:
    """Returns a text argument of the command line. Raises UsageError if it is not UTF-8."""
    # Python turns bytes of the command line that are not UTF-8 into lone surrogates.
    return decode(text.encode("utf-8", "surrogateescape"), name)
