"""Replay of fixed texts through prompt lookup, for ``speculation.py``.

There are three kinds of texts, made from the texts of this repository: free prose, summaries that quote
their document, and edits of code and prose. The replay supposes that the model writes exactly the given
answer, so it tells what the drafter can contribute, not what a model writes.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grinqh_jax.decoding.slots.step_shapes import StepShape
from grinqh_jax.decoding.speculation import block_dial
from grinqh_jax.decoding.speculation.draft_length import Acceptance, DraftLength
from grinqh_jax.decoding.speculation.lookup import LEAST_MATCHED, MOST_MATCHED, look_up
from grinqh_jax.text.tokenizer import Tokenizer

DATA = pathlib.Path(__file__).parents[1] / "checkpoints_tools" / "data" / "mixed"
DRAFTS = (1, 3, 7, 15)
FREE_PROMPT_SHARE = 0.3
"""Share of a free text that is its prompt."""

RENAMED = {"layout": "storage", "words": "units", "tokens": "symbols", "rows": "lines", "return": "yield"}
"""Words that the edits replace."""

StepTime = Callable[[StepShape, float], float]
"""Maps a shape, and the share of steps in which the text has drafts, to the mean time of a step."""


def texts() -> list[tuple[str, str, str]]:
    """Returns the kind, the prompt and the answer of every text."""

    def read(name: str) -> list[str]:
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    prose, code = read("prose.jsonl"), read("source_code.jsonl")
    result = []
    for text in prose:
        cut = text.index(" ", int(FREE_PROMPT_SHARE * len(text)))
        result.append(("free", text[:cut], text[cut:]))
        sentences = re.split(r"(?<=[.!?]) ", text)
        quotes = " ".join(f'The text says: "{sentence}"' for sentence in sentences[1::4])
        result.append(("quotes", f"Summarize with quotes:\n\n{text}\n\nSummary:\n\n", quotes))
    for text in [*code, *prose]:
        edited = text
        for old, new in RENAMED.items():
            edited = re.sub(rf"\b{old}\b", new, edited)
        edited = re.sub(r"\bwas\b", "is", edited) if text in prose else edited
        if edited != text:
            result.append(("edits", f"Edit this text:\n\n{text}\n\nEdited:\n\n", edited))
    return result


@dataclasses.dataclass(frozen=True)
class Replay:
    """An answer, and what lookup proposes at each of its positions.

    Attributes:
      answer: Tokens of the answer. The first comes from the prefill.
      proposals: Drafts for the tokens from the second on, empty where lookup has none.
    """

    answer: np.ndarray
    proposals: list[np.ndarray]

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: str, answer: str) -> "Replay":
        """Looks up the drafts of all positions at once.

        Args:
          tokenizer: Tokenizer of the model that writes the answer.
          prompt, answer: The text.
        """
        start = tokenizer.encode(prompt)
        tokens = np.array(start + tokenizer.encode(answer, special_tokens=False), np.int32)
        positions = np.arange(len(start) + 1, len(tokens))
        padded = np.zeros(-(-len(tokens) // 256) * 256, np.int32)
        padded[: len(tokens)] = tokens
        proposals = []
        for piece in np.array_split(positions, -(-len(positions) // 64)):
            lengths = np.zeros(64, np.int32)
            lengths[: len(piece)] = piece
            draft = _look_up(jnp.asarray(np.tile(padded, (64, 1))), jnp.asarray(lengths))
            rows = zip(np.asarray(draft.tokens), np.asarray(draft.counts), strict=True)
            proposals += [row[:count] for row, count in rows][: len(piece)]
        return cls(tokens[len(start) :], proposals)

    def step(self, place: int, most: int, in_blocks: bool) -> tuple[int, int]:
        """Returns the numbers of drafts that a step verifies and accepts.

        Args:
          place: Number of tokens of the answer before the step, at least 1.
          most: Largest number of drafts.
          in_blocks: Whether steps end at the blocks of the dial (``block_dial``).
        """
        left = len(self.answer) - place - 1
        if in_blocks:
            left = min(left, block_dial.BLOCK - 1 - (place - 1) % block_dial.BLOCK)
        draft = self.proposals[place - 1][: min(most, left)]
        equal = draft == self.answer[place : place + len(draft)]
        return len(draft), int(np.argmin([*equal, False]))


_look_up = jax.jit(lambda tokens, lengths: look_up(tokens, lengths, DRAFTS[-1], LEAST_MATCHED, MOST_MATCHED))


def counted(replay: Replay, in_blocks: bool) -> dict[int, dict[str, int]]:
    """Returns steps, drafts and accepted drafts of an answer, by the largest number of drafts."""
    figures = {}
    for most in (0, *DRAFTS):
        place, counts = 1, {"steps": 0, "drafting": 0, "drafted": 0, "accepted": 0}
        while place < len(replay.answer):
            drafted, accepted = replay.step(place, most, in_blocks)
            counts["steps"] += 1
            counts["drafting"] += drafted > 0
            counts["drafted"] += drafted
            counts["accepted"] += accepted
            place += accepted + 1
        figures[most] = counts
    return figures


def replays(model: pathlib.Path) -> dict[str, list[Replay]]:
    """Returns the replays of all texts by kind, with the tokenizer of a model."""
    tokenizer, by_kind = Tokenizer.load(model), collections.defaultdict(list)
    for kind, prompt, answer in texts():
        by_kind[kind].append(Replay.of(tokenizer, prompt, answer))
    return dict(by_kind)


def sums(by_kind: dict[str, list[Replay]]) -> list[dict]:
    """Returns the sums of ``counted`` over all texts, by kind and number of drafts."""
    rows = []
    for kind, of_kind in by_kind.items():
        total = collections.defaultdict(collections.Counter)
        for replay in of_kind:
            for most, counts in counted(replay, in_blocks=True).items():
                total[most].update(counts)
        for most, counts in total.items():
            row = {"kind": kind, "drafts": most, **counts}
            row["tokens_per_step"] = round((counts["steps"] + counts["accepted"]) / counts["steps"], 3)
            row["acceptance"] = (
                round(counts["accepted"] / counts["drafted"], 3) if counts["drafted"] else None
            )
            rows.append(row)
    return rows


def chosen_seconds(
    of_kind: Sequence[Replay], shapes: Sequence[StepShape], chunk_steps: int, seconds: StepTime
) -> float:
    """Returns the time in which a loop with one slot decodes texts one after another.

    ``DraftLength`` chooses the drafts of every chunk, as in the scheduler. It knows the times and the
    acceptance of the chunks that have arrived: one chunk is always in flight.

    Args:
      of_kind: The texts.
      shapes: Shapes of steps that the loop has programs for.
      chunk_steps: Steps of a chunk without drafts.
      seconds: Time of a step.
    """
    length, total = DraftLength(shapes), 0.0
    for replay in of_kind:
        acceptance, place, arrived = Acceptance(), 1, None
        while place < len(replay.answer):
            shape = length.choose([acceptance])
            if arrived is not None:
                before, counts, time = arrived
                if before.drafts:
                    acceptance.update(*counts)
                length.measure(before, *counts[:2], time)
            steps = drafting = drafted = accepted = 0
            # The steps after the end of a text do not count, as they do not in plain decoding.
            while steps < shape.steps(chunk_steps) and place < len(replay.answer):
                verified, right = replay.step(place, shape.drafts, in_blocks=True)
                steps, drafting = steps + 1, drafting + (verified > 0)
                drafted, accepted = drafted + verified, accepted + right
                place += right + 1
            time = steps * seconds(shape, drafting / steps)
            arrived = shape, (steps, drafting, drafted, accepted), time
            total += time
    return total
