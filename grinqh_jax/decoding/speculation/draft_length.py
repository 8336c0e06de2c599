"""The shape of every decode chunk, which the host chooses before it: numbers of slots and of drafts.

Without drafts, the chunk decodes as few slots as there are programs for.

A step with k drafts yields ``1 + c (a + a^2 + ... + a^k)`` tokens of a text, where ``c`` is the share of
steps in which the drafter has a draft, and ``a`` the probability that a draft is accepted if those before it
were. Both are estimated for every text, from its last steps. A step in which no text has a draft takes less
time than one that verifies drafts, and both times are measured for every shape while the engine runs. So the
times do not depend on the texts that were decoded when they were measured. A chunk has drafts if it then
yields clearly more tokens per second. If it has none, a chunk with drafts is run now and then, because the
text may have changed.

The decision changes the speed and not the text (see ``block_dial`` and ``acceptance``).
"""

import dataclasses
import math
from collections.abc import Sequence

from grinqh_jax.decoding.slots.step_shapes import StepShape

FORGETTING = 0.9
"""Weight of the estimates of a text after each step with drafts."""

PRIOR_ACCEPTED, PRIOR_TRIED = 3.0, 4.0
"""Drafts that a new text is assumed to have accepted and tried, so that its first chunks have drafts."""

PROBE_CHUNKS = 32
"""Number of chunks without drafts before one with drafts is tried again."""

LEAST_GAIN = 0.01
"""Least gain for which a chunk has drafts, as a share of the speed without. A text whose drafts gain or cost
little would otherwise have them half of the time, because the estimates err."""

ASSUMED_ROW_COST = 0.2
"""Time of a further row over that of a step with one row, before it was measured. Steps of one text with 1, 3
and 7 drafts take 1.20, 1.49 and 2.05 plain steps (Qwen3-8B, 3 bits, H200; docs/performance.md)."""

NEW_MEASUREMENT = 0.25
"""Weight of a new measurement of the times of a step."""


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


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Estimated times of a step of one shape.

    Attributes:
      idle: Time of a step in which no text has a draft, in seconds.
      drafting: Time of a step that verifies drafts, in seconds.
    """

    idle: float
    drafting: float

    @classmethod
    def assumed(cls, shape: StepShape) -> "StepTimes":
        """Returns times before a measurement, where a step with one row takes 1."""
        texts, rows = shape.texts, shape.texts * (shape.drafts + 1)
        return cls(1 + ASSUMED_ROW_COST * (texts - 1), 1 + ASSUMED_ROW_COST * (rows - 1))

    def scaled(self, factor: float) -> "StepTimes":
        """Returns the times multiplied by a factor."""
        return StepTimes(factor * self.idle, factor * self.drafting)

    def mean(self, drafting: float) -> float:
        """Returns the mean time of steps of which a share ``drafting`` verifies drafts."""
        return self.idle + drafting * (self.drafting - self.idle)

    def updated(self, drafting: float, seconds: float) -> "StepTimes":
        """Returns the times after a measurement of the mean.

        Steps without drafts are measured alone. Other measurements tell the time of a step with drafts. That
        is never the shorter one: otherwise a wrong time of the one would drive the other below zero.
        """
        expected = self.mean(drafting)
        # A pause of the host can make a step seem many times as long.
        change = NEW_MEASUREMENT * (min(seconds, 2 * expected) - expected)
        if drafting:
            return StepTimes(min(self.idle, self.drafting + change), self.drafting + change)
        return StepTimes(self.idle + change, max(self.idle + change, self.drafting))


class DraftLength:
    """Chooses the shape of every decode chunk.

    Attributes:
      shapes: Shapes of steps (see ``step_shapes``).
      times: Times of a step of each shape that was measured.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
        *,
        always: bool = False,
        measures: bool = True,
        reads_all_rows: bool = False,
    ):
        """Starts without measurements.

        Args:
          shapes: See ``step_shapes``.
          always: Whether to draft as much as possible, also where it does not pay.
          measures: Whether measured times count. If not, the choice depends on the texts alone, so several
            processes that run one model together choose the same.
          reads_all_rows: Whether a step reads the rows of all drafts even if no text has any, as on a mesh.
        """
        self.shapes = tuple(shapes)
        self.times: dict[StepShape, StepTimes] = {}
        self._always = always
        self._measures = measures
        self._reads_all_rows = reads_all_rows
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
        best = max(drafting, key=lambda shape: self._speed(shape, texts))
        if self._speed(best, texts) > (1 + LEAST_GAIN) * self._speed(plain, texts):
            self._without = 0
            return best
        self._without += 1
        if self._without <= PROBE_CHUNKS:
            return plain
        self._without = 0
        return min(drafting, key=lambda shape: shape.texts * (shape.drafts + 1))

    def measure(self, shape: StepShape, steps: int, drafting: int, seconds: float) -> None:
        """Adds the time of a chunk of ``steps`` steps, of which ``drafting`` verified drafts."""
        if steps == 0 or not self._measures:
            return
        share, each = drafting / steps, seconds / steps
        old = self._expected(shape)
        if shape not in self.times:
            self.times[shape] = old.scaled(each / old.mean(share))
        elif self._reads_all_rows:
            both = old.updated(1, each).drafting
            self.times[shape] = StepTimes(both, both)
        else:
            self.times[shape] = old.updated(share, each)

    def _speed(self, shape: StepShape, texts: Sequence[Acceptance]) -> float:
        tokens = sum(text.tokens_per_step(shape.drafts) for text in texts)
        none = math.prod(1 - text.drafting / text.steps for text in texts)
        return tokens / self._expected(shape).mean(1 - none if shape.drafts else 0)

    def _expected(self, shape: StepShape) -> StepTimes:
        """Returns the measured times of a step, or assumed ones, which follow the first measured shape."""
        if shape in self.times:
            return self.times[shape]
        known = next(iter(self.times), None)
        scale = 1.0 if known is None else self.times[known].idle / self._assumed(known).idle
        return self._assumed(shape).scaled(scale)

    def _assumed(self, shape: StepShape) -> StepTimes:
        times = StepTimes.assumed(shape)
        return StepTimes(times.drafting, times.drafting) if self._reads_all_rows else times
