"""Checks that text from outside is valid Unicode, so that all other code can rely on it."""

from grinqh_jax.errors import UsageError


def decode(data: bytes, source: str, first_line: int = 1) -> str:
    """Decodes UTF-8 and drops a byte order mark, which some editors write.

    Args:
      data: Bytes to decode.
      source: Name of their origin, for the error message.
      first_line: Number of the first line of ``data`` in its origin.

    Raises:
      UsageError: ``data`` is not UTF-8. The message names the source, the first invalid byte and its line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UsageError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}; "
            "convert it first (iconv -t utf-8)"
        ) from None


def lone_surrogate(text: str) -> str | None:
    r"""Returns the escape (``\ud83d``) of the first half of a surrogate pair in ``text``, or None.

    JSON can spell such a half. It is no character, and no UTF-8 text holds it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def check(text: str, source: str) -> str:
    """Returns ``text``. Raises UsageError, which names ``source``, if it holds a lone surrogate."""
    if (escape := lone_surrogate(text)) is not None:
        raise UsageError(f"{source} holds {escape}, half of a surrogate pair, which is not text; remove it")
    return text
