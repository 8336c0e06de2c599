"""Calibration text, tokenized and cut into windows of one length."""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from checkpoints_tools.calibration import documents
from checkpoints_tools.calibration.self_text import sampled_windows
from grinqh_jax.errors import CheckpointError, GrinqhWarning, UsageError
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.text.tokenizer import Tokenizer

BUNDLED, MIXED, SELF = NAMED = ("bundled", "mixed", "self")
"""Texts that have a name: plain text, documents of several kinds, and text that the model itself samples."""

BUNDLED_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"

CALIB_HELP = (
    "calibration texts, with equal shares of the tokens (a text named twice gets two shares): .txt files, "
    f".jsonl files with text, question and answer, or messages, {MIXED} (several kinds, and chats), {SELF} "
    f"(sampled from the model) or {BUNDLED} (default: {BUNDLED}, with {MIXED} if there is a chat template)"
)
"""Description of the flag ``--calib``."""

DEFAULT_TOKENS = 32768
"""Maximum number of calibration tokens, unless the caller asks for another."""

OTHER_TOKENS = 2048
"""Maximum number of tokens of the text of another kind."""

MAX_WINDOW = 1024
"""Longest window in tokens."""

_TURN = 4
"""Every fourth window is for thresholds."""

_LEAST_TOKENS = 256

_CHARS_PER_TOKEN = 6
"""Upper estimate of the characters of a token: a span of this many characters a token fills its window."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text that a quantizer sees.

    Attributes:
      windows: Token ids ``[windows, tokens of a window]``.
      other: Token ids of a text of another kind, which refitted weights are checked on.
      name: Name of the text, for the provenance of a checkpoint.
    """

    windows: Int32[np.ndarray, "s t"]
    other: Int32[np.ndarray, "s2 t2"]
    name: str


def read_calibration(source: HFCheckpoint, texts: Sequence[Path | str], tokens: int) -> Calibration:
    """Reads calibration texts and tokenizes them with the tokenizer of a checkpoint.

    Several texts get equal shares of the tokens, rounded down to whole windows; a text that is named n times
    gets n shares. The text of another kind is ``MIXED``, or ``BUNDLED`` if ``MIXED`` is among the texts.

    Args:
      source: Checkpoint whose tokenizer and vocabulary are used.
      texts: Files (see ``documents.read``), or names from ``NAMED``. Empty selects ``default_texts``.
      tokens: Maximum number of tokens.

    Raises:
      GrinqhError: The tokenizer is missing or does not fit the model, a text is too short, or ``tokens`` are
        too few for this number of texts.
    """
    tokenizer = Tokenizer.load(source.directory)
    shares = collections.Counter(texts or default_texts(tokenizer))
    names = [str(text) if text in NAMED else Path(text).name for text in shares]
    if names == [SELF]:
        warnings.warn(
            f"--calib {SELF} alone: at 2 to 4 bits a 135M model diverged 7 to 28 % more than with {BUNDLED}"
            f" {MIXED}; name another text beside it, such as {BUNDLED} or {MIXED}",
            GrinqhWarning,
            stacklevel=2,
        )
    if tokens < (least := _LEAST_TOKENS * shares.total()):
        raise UsageError(
            f"--tokens {tokens}: {' and '.join(names)} need at least {least}, {_LEAST_TOKENS} for each share"
        )
    share = tokens // shares.total()
    length = min(MAX_WINDOW, source.config.max_position_embeddings)
    sets = [_windows_of_text(source, tokenizer, text, n * share, length) for text, n in shares.items()]
    for name, n, rows in zip(names, shares.values(), sets, strict=True):
        expected = n * share // min(length, max(n * share, 1)) * min(length, n * share)
        if len(sets) > 1 and rows.size < expected:
            raise UsageError(
                f"calibration text {name}: {rows.size} of the {expected} tokens that are its share; give a"
                " longer text or fewer tokens"
            )
    token_windows = _in_turns(sets, list(shares.values()))
    kind = BUNDLED if MIXED in names else MIXED
    other = _windows_of_text(source, tokenizer, kind, OTHER_TOKENS, length)
    if (largest := max(token_windows.max(), other.max())) >= source.config.vocab_size:
        raise CheckpointError(
            f"{source.directory}: the tokenizer produces token {largest}, but the model has a"
            f" vocabulary of {source.config.vocab_size}; use the tokenizer that belongs to the model"
        )
    shared = [f"{n} {name}" if n > 1 else name for name, n in zip(names, shares.values(), strict=True)]
    return Calibration(windows=token_windows, other=other, name="+".join(shared))


def default_texts(tokenizer: Tokenizer) -> list[Path | str]:
    """Returns the names of the default texts: ``BUNDLED``, with ``MIXED`` if the model has a chat template.

    Chats diverge less if the calibration text has some, and other texts a little more (``docs/quality.md``).
    """
    return [BUNDLED, MIXED] if tokenizer.has_chat_template else [BUNDLED]


def _in_turns(sets: Sequence[Int32[np.ndarray, "_ t"]], shares: Sequence[int]) -> Int32[np.ndarray, "s t"]:
    """Merges the windows of several texts, which take turns of ``_TURN`` windows for each of their shares.

    So all texts are among the first windows, which weights are refitted to, and among every fourth window,
    which thresholds are placed on (``split_windows``).
    """
    turns = [_TURN * share for share in shares]
    count = max(-(-len(rows) // turn) for rows, turn in zip(sets, turns, strict=True))
    return np.concatenate(
        [
            rows[i * turn : (i + 1) * turn]
            for i in range(count)
            for rows, turn in zip(sets, turns, strict=True)
        ]
    )


def _windows_of_text(
    source: HFCheckpoint, tokenizer: Tokenizer, text: Path | str, tokens: int, length: int
) -> Int32[np.ndarray, "s t"]:
    """Returns the windows of one text."""
    if text == SELF:
        return sampled_windows(source, tokenizer, tokens, length)
    if text == MIXED:
        found = documents.mixed()
    else:
        found = documents.read(BUNDLED_TEXT if text == BUNDLED else Path(text))
    rendered = (documents.render(document, tokenizer) for document in found)
    return windows("\n\n".join(rendered), tokenizer.encode, tokens, length)


def windows(
    text: str, encode: Callable[[str], Sequence[int]], tokens: int, length: int
) -> Int32[np.ndarray, "s t"]:
    """Cuts token windows at equal distances from the whole text.

    A span that yields too few tokens, such as one of blanks, yields no window. Other spans yield a second one
    in its place.

    Args:
      text: Text of any length; only the spans that become windows are tokenized.
      encode: Function from text to token ids.
      tokens: Number of tokens wanted, rounded down to whole windows. A short text yields fewer.
      length: Tokens of a window. A window is shorter if the text, or ``tokens``, is shorter than one.

    Raises:
      UsageError: The text yields fewer than 256 tokens, too few to place thresholds, or less than half of the
        tokens that its length promises.
    """
    length = min(length, tokens)
    count = max(1, min(tokens // length, len(text) // (_CHARS_PER_TOKEN * length)))
    span = len(text) // count
    limit = 2 * _CHARS_PER_TOKEN * length
    spans = [encode(text[i * span : i * span + min(span, limit)]) for i in range(count)]
    rows = _windows_of_spans(spans, length, count)
    total = rows.size
    if total < _LEAST_TOKENS:
        raise UsageError(
            f"calibration text: {total} tokens from {len(text)} characters; give a text of at least"
            f" {_LEAST_TOKENS} tokens"
        )
    if 2 * total < count * length and count > 1:
        raise UsageError(
            f"calibration text: {total} tokens from {len(text)} characters, which should yield"
            f" {count * length}; remove runs of blanks and of other repeated characters, or give another text"
        )
    return rows


def _windows_of_spans(spans: Sequence[Sequence[int]], length: int, count: int) -> Int32[np.ndarray, "s t"]:
    """Cuts ``count`` windows of ``length`` tokens, or as many tokens as possible in windows of one length."""
    whole = [len(span) // length for span in spans]
    if sum(whole) < count:  # too few tokens: the length that uses most of them
        length = max({len(span) for span in spans}, key=lambda n: (n * sum(len(s) >= n for s in spans), n))
        whole = [min(1, len(span) // max(length, 1)) for span in spans]
    # One window a span, then a second one of the first spans that have one, until the number is reached.
    turns = [(turn, i) for turn in range(max(whole)) for i in range(len(spans)) if turn < whole[i]]
    chosen = sorted((i, turn) for turn, i in turns[:count])
    return np.array([spans[i][turn * length : (turn + 1) * length] for i, turn in chosen], np.int32)


def split_windows(
    windows: Int32[np.ndarray, "s t"],
) -> tuple[Int32[np.ndarray, "a u"], Int32[np.ndarray, "b u"]]:
    """Splits windows into three of every four and the fourth.

    With two or three windows the last one is the second set. A single window is cut in halves.
    """
    if len(windows) == 1:
        middle = windows.shape[1] // 2
        return windows[:, :middle], windows[:, middle : 2 * middle]
    step = min(_TURN, len(windows))
    second = np.arange(len(windows)) % step == step - 1
    return windows[~second], windows[second]
