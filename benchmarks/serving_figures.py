"""What ``serving`` computes from the answers of a load: the steady speed, and what it is compared with."""

import argparse
import dataclasses
from typing import Literal

from grinqh_jax.benchmarking import random_model

Weights = Literal["graded", "bf16"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a server is measured with.

    Attributes:
      weights: Weights of the model.
      bits: Bits that all requests ask for.
    """

    weights: Weights
    bits: float | str


def steady(ends: list[float], rows: int, tokens: int, prompt_seconds: float, batched: float) -> dict | None:
    """Returns the speed while all clients have requests; None if there are fewer than three rounds.

    Args:
      ends: Times of the ends of the answers, in seconds, in order.
      rows: Number of answers that are decoded at once. Each client's requests follow one another, so after as
        many answers the load is again what it was.
      tokens: Number of tokens of an answer.
      prompt_seconds: Time of a prompt.
      batched: Tokens per second without prompts that the decode speed is compared with.
    """
    answers = (len(ends) - rows - 1) // rows * rows  # The last answers end when some clients are done.
    if answers < 1:
        return None
    seconds = ends[answers] - ends[0]
    decode = answers * tokens / (seconds - answers * prompt_seconds)
    return {
        "answers": answers,
        "tokens_per_second": round(answers * tokens / seconds, 1),
        "decode_tokens_per_second": round(decode, 1),
        "of_batched": round(decode / batched, 3),
    }


def batched_speed(batched: dict, setting: Setting, rows: int, args: argparse.Namespace) -> float | None:
    """Returns the tokens per second of all rows in a result of ``decode.py``, None if it has no such row.

    Of several contexts it is the one nearest to that in the middle of an answer.
    """
    bits = setting.bits if setting.weights == "graded" else "bf16"
    middle = args.prompt_tokens + args.max_tokens / 2
    found = [
        row
        for row in batched["shapes"].get(random_model.label(args.shape), {}).get("decode", [])
        if (row["batch"], row["bits"], row["devices"]) == (rows, bits, 1)
    ]
    nearest = min(found, key=lambda row: abs(row["context"] - middle), default=None)
    return nearest and nearest["tokens_per_second_of_all_rows"]
