"""Reads text from the command line and from standard input."""

import sys

from grinqh_jax.errors import UsageError


def read_prompt(text: str) -> str:
    """Returns the prompt given with ``--prompt``: the text itself, or all of standard input for ``-``.

    Raises:
      UsageError: the prompt is not UTF-8.
    """
    if text == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    # Python turns bytes of the command line that are not UTF-8 into lone surrogates.
    return decode(text.encode("utf-8", "surrogateescape"), "the prompt")


def decode(data: bytes, source: str) -> str:
    """Decodes UTF-8.

    Args:
      data: the bytes to decode.
      source: name of their origin, for the error message.

    Raises:
      UsageError: ``data`` is not UTF-8; the message names the source and the first invalid byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first (iconv -t utf-8)"
        ) from None
