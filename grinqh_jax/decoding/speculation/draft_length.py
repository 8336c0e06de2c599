"""The shape of every decode chunk, which the host chooses before it: numbers of slots and of drafts.

Without drafts, the chunk decodes as few slots as there are programs for.

A step with k drafts yields ``1 + c (a + a^2 + ... + a^k)`` tokens of a text, where ``c`` is the share of
steps in which the drafter has a draft, and ``a`` the probability that a draft is accepted if those before it
were. Both are estimated for every text, from its last steps. The time of a step with ``n`` texts and ``k``
drafts is measured while the engine runs. The chunk with the most tokens per second is chosen. If that is one
without drafts, a chunk with drafts is run now and then, because the text may have changed.

The decision changes the speed and not the text (see ``block_dial`` and ``acceptance``).
"""

import dataclasses
from collections.abc import Sequence

from grinqh_jax.decoding.slots.step_shapes import StepShape

FORGETTING = 0.9
"""Weight of the estimates of a text after each step with drafts."""

PRIOR_ACCEPTED, PRIOR_TRIED = 3.0, 4.0
"""Drafts that a new text is assumed to have accepted and tried, so that its first chunks have drafts."""

PROBE_CHUNKS = 32
"""Number of chunks without drafts before one with drafts is tried again."""

ASSUMED_ROW_COST = 0.2
"""Time of a further row over that of a step with one row, before it was measured. Steps of one text with 1, 3
and 7 drafts take 1.20, 1.49 and 2.05 plain steps (Qwen3-8B, 3 bits, H200; docs/performance.md)."""

NEW_MEASUREMENT = 0.25
"""Weight of a new measurement of the time of a step."""


@dataclasses.dataclass
class Acceptance:
    """Estimates for one text, from its last steps.

    Attributes:
      accepted, tried: Drafts that were accepted, and drafts up to the first that was not.
      steps, drafting: Steps in which the text could have drafts, and steps in which it had.
    """

    accepted: float = PRIOR_ACCEPTED
    tried: float = PRIOR_TRIED
    steps: float = 1.0
    drafting: float = 1.0

    def update(self, steps: int, drafting: int, drafted: int, accepted: int) -> None:
        """Adds the steps of a chunk that had room for drafts.

        Args:
          steps: Number of steps.
          drafting: Number of steps with drafts.
          drafted, accepted: Number of drafts that were verified and accepted.
        """
        if steps == 0:
            return
        keep = FORGETTING**steps
        self.steps = keep * self.steps + steps
        self.drafting = keep * self.drafting + drafting
        if drafting:
            keep = FORGETTING**drafting
            # Each step with a rejected draft tried one draft more than it accepted.
            tried = accepted + min(drafting, drafted - accepted)
            self.accepted = keep * self.accepted + accepted
            self.tried = keep * self.tried + tried

    def tokens_per_step(self, drafts: int) -> float:
        """Returns the expected number of tokens of a step with up to ``drafts`` drafts."""
        rate = min(self.accepted / self.tried, 0.995)
        return 1 + self.drafting / self.steps * rate * (1 - rate**drafts) / (1 - rate)


class DraftLength:
    """Chooses the shape of every decode chunk.

    Attributes:
      shapes: Shapes of steps (see ``step_shapes``).
      seconds: Time of a step of each shape that was measured.
    """

    def __init__(self, shapes: Sequence[StepShape], *, always: bool = False, measures: bool = True):
        """Starts without measurements.

        Args:
          shapes: See ``step_shapes``.
          always: Whether to draft as much as possible, also where it does not pay.
          measures: Whether measured times count. If not, the choice depends on the texts alone, so several
            processes that run one model together choose the same.
        """
        self.shapes = tuple(shapes)
        self.seconds: dict[StepShape, float] = {}
        self._always = always
        self._measures = measures
        self._without = 0

    def choose(self, texts: Sequence[Acceptance], least: int = 0) -> StepShape:
        """Returns the shape of the next chunk, which decodes these texts and at least ``least`` slots."""
        fitting = [shape for shape in self.shapes if shape.texts >= max(len(texts), least)]
        drafting = [shape for shape in fitting if shape.drafts]
        plain = min(shape for shape in fitting if not shape.drafts)
        if not drafting:
            return plain
        if self._always:
            return max(drafting, key=lambda shape: shape.drafts)
        best = max([plain, *drafting], key=lambda shape: self._speed(shape, texts))
        if best.drafts:
            self._without = 0
            return best
        self._without += 1
        if self._without <= PROBE_CHUNKS:
            return best
        self._without = 0
        return min(drafting, key=lambda shape: shape.texts * (shape.drafts + 1))

    def measure(self, shape: StepShape, steps: int, seconds: float) -> None:
        """Adds the time of a chunk of ``steps`` steps."""
        if steps == 0 or not self._measures:
            return
        each = seconds / steps
        old = self.seconds.get(shape, each)
        # A pause of the host makes a step seem longer, never shorter.
        self.seconds[shape] = min((1 - NEW_MEASUREMENT) * old + NEW_MEASUREMENT * each, 2 * old)

    def _speed(self, shape: StepShape, texts: Sequence[Acceptance]) -> float:
        tokens = sum(text.tokens_per_step(shape.drafts) for text in texts)
        return tokens / self._predicted(shape)

    def _predicted(self, shape: StepShape) -> float:
        if shape in self.seconds:
            return self.seconds[shape]

        def assumed(one: StepShape) -> float:
            return 1 + ASSUMED_ROW_COST * (one.texts * (one.drafts + 1) - 1)

        known = next(((one, seconds) for one, seconds in self.seconds.items()), None)
        scale = 1.0 if known is None else known[1] / assumed(known[0])
        return scale * assumed(shape)
