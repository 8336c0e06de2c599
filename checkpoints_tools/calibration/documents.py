"""Calibration documents: plain texts and conversations, from files or from the collection ``mixed``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grinqh_jax.errors import UsageError
from grinqh_jax.text.documents import read_documents, read_records, record_text
from grinqh_jax.text.tokenizer import Message, Tokenizer

Document = str | list[Message]
"""A text, or the turns of a conversation."""

MIXED_DOCUMENTS = Path(__file__).parents[1] / "data" / "mixed"
"""Directory of the collection ``mixed``: one ``.jsonl`` file for each kind of text."""

EXPECTED = "a string under text, a string under question and under answer, or a list under messages"


def read(path: Path) -> list[Document]:
    """Reads the single document of a text file, or one document per line of a ``.jsonl`` file.

    A record has its text under ``text``, a task under ``question`` and ``answer``, or the turns of a
    conversation under ``messages``: objects with ``role`` and ``content``.

    Raises:
      UsageError: The file cannot be read, is not UTF-8, holds no text, or has bad records.
    """
    if path.suffix != ".jsonl":
        return list(read_documents(path))
    documents: list[Document] = read_records(path, _document, EXPECTED)
    if not documents:
        raise UsageError(f"{path} holds no text")
    return documents


def mixed() -> list[Document]:
    """Returns the documents of ``mixed``. The kinds alternate, so every part of the list has all of them."""
    kinds = [read(path) for path in sorted(MIXED_DOCUMENTS.glob("*.jsonl"))]
    return spread(kinds)


def spread(kinds: Sequence[Sequence[Any]]) -> list[Any]:
    """Merges sequences so that each one is spread evenly over the result, in its own order."""
    placed = [
        ((i + 0.5) / len(items), kind, item)
        for kind, items in enumerate(kinds)
        for i, item in enumerate(items)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def render(document: Document, tokenizer: Tokenizer) -> str:
    """Returns the text of a document as the model reads it in use.

    A conversation is written with the chat template of the tokenizer. Without one, and if the template
    refuses the conversation, for instance its roles, each turn begins with the name of its role.
    """
    if isinstance(document, str):
        return document
    if tokenizer.has_chat_template:
        try:
            return _without_bos(tokenizer.chat_text(document, add_generation_prompt=False), tokenizer)
        except UsageError:
            pass
    return "\n\n".join(f"{turn['role'].title()}: {turn['content']}" for turn in document)


def _without_bos(text: str, tokenizer: Tokenizer) -> str:
    """Removes the BOS token of a template.

    Attention dumps on BOS what it does not need. In the middle of a window, where a conversation begins here
    and never in use, its extreme activations would count.
    """
    bos = tokenizer.bos_text
    return text.removeprefix(bos) if bos else text


def _document(record: Any) -> Document | None:
    match record:
        case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
            return [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        case {"messages": _}:
            return None
    return record_text(record)


def _is_message(turn: Any) -> bool:
    match turn:
        case {"role": str(), "content": str()}:
            return True
    return False
