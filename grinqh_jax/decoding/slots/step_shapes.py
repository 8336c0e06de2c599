"""The sizes of decode steps that an engine has programs for.

A chunk decodes the slots in use. There is a program for each power of two, so it decodes fewer than as many
idle slots besides. Chunks that are rare, with log-probabilities or with masks, have a program for all slots
only, because each program is compiled when the engine starts.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.model.config import ModelConfig
from pallas_kernels.lanes import device

LONG_STEP_TEXTS = 8
"""Number of texts from which on a step takes at least twice as long as with one (Qwen3-8B on an H200: 3.2 and
1.5 ms)."""

MOST_DRAFTING_STEPS = 8
"""Most steps of a chunk with drafts. The host learns only after each chunk whether drafts pay, and by then
the next one runs."""


class StepShape(NamedTuple):
    """Sizes of a step: ``texts * (drafts + 1)`` rows.

    Attributes:
      texts: Number of slots that it decodes.
      drafts: Largest number of drafts of each (see ``speculation``).
    """

    texts: int
    drafts: int

    def steps(self, chunk_steps: int) -> int:
        """Returns the number of such steps in a chunk: half of ``chunk_steps`` if each takes longer.

        A chunk with drafts has at most ``MOST_DRAFTING_STEPS``.
        """
        half = -(-chunk_steps // 2)
        if self.drafts:
            return min(half, MOST_DRAFTING_STEPS)
        return half if self.texts >= LONG_STEP_TEXTS else chunk_steps


def rows_are_independent(config: ModelConfig) -> bool:
    """Returns whether a row of a graded step has the same bits among any number of rows.

    XLA computes gated delta nets and, on a GPU, routers with a shared expert in an order that may depend on
    the number of rows. On a CPU it fuses the operations of small mixtures of experts differently for one row.
    """
    if any(layer.delta_net for layer in config.layers):
        return False
    on_cpu = device.target_device().platform == "cpu"
    return not any(layer.experts and (on_cpu or layer.experts.shared) for layer in config.layers)


def row_counts(slots: int, *, fixed: bool) -> list[int]:
    """Returns the numbers of slots that a step may decode, all of them first.

    Args:
      slots: Number of slots.
      fixed: Whether every step decodes all slots.
    """
    # More slots read weights at one level (``reading``), and up to 16 rows the weights are most of the time.
    # Products of 16, 32 and 64 rows at one level may add in another order.
    least = 1 if slots <= MAX_GRADED_ROWS else MAX_GRADED_ROWS
    powers = (least << i for i in range(slots.bit_length()))
    return [slots, *(() if fixed else (count for count in powers if count < slots))]


def step_shapes(counts: Iterable[int], most_drafts: int, contiguous: bool) -> list[StepShape]:
    """Returns the shapes of steps that an engine needs programs for, that of all slots without drafts first.

    The more texts there are, the fewer drafts has each.

    Args:
      counts: Numbers of slots that a step without drafts may decode, all slots first.
      most_drafts: Largest number of drafts of a text; 0 without speculation.
      contiguous: Whether the cache is contiguous, so that a step decodes all slots.
    """

    def drafts(texts: int) -> int:
        return min(MAX_GRADED_ROWS // texts - 1, most_drafts)

    shapes = [StepShape(count, 0) for count in counts]
    slots = shapes[0].texts
    drafting = [slots]
    if not contiguous:
        drafting += [texts for texts in (1, 2, 4, 8) if texts < slots]
    shapes += [StepShape(texts, drafts(texts)) for texts in drafting if drafts(texts) > 0]
    return list(dict.fromkeys(shapes))
