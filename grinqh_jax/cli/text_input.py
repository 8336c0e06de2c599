"""Text from the command line and from standard input."""

import sys

from grinqh_jax.errors import UsageError


def read_prompt(text: str) -> str:
    """The prompt of ``--prompt``: the text itself, or for ``-`` all of standard input as it is.

    Raises:
      UsageError: it is not UTF-8.
    """
    if text == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return decode(text.encode("utf-8", "surrogateescape"), "the prompt")


def decode(data: bytes, place: str) -> str:
    """The text of bytes that should be UTF-8.

    Raises:
      UsageError: they are not; names the place and the first wrong byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first (iconv -t utf-8)"
        ) from None
