"""The online softmax of a warp: its registers, and attention to the 16 positions of a step."""

import dataclasses
import math
from collections.abc import Callable

from pallas_kernels.decode_attention.cached_positions import LANE_KEYS, LANE_VALUES
from pallas_kernels.decode_attention.lane_context import MASKED_SCORE, Shape
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

Queries = Callable[[int], list[Value]]
"""Returns the lane's words of its query row in an octet, in the order of the words of a key."""


@dataclasses.dataclass
class OnlineSoftmax:
    """The softmax of one query row over the positions that the warp has attended to so far."""

    running_max: Value
    """Largest score; the four lanes of the row hold the same."""
    running_sum: Value
    """Sum of the weights of this lane's positions, a partial sum of the row's four lanes."""
    accumulator: list[Value]
    """Weighted values: elements ``2 column`` and ``2 column + 1`` of every block of 8 (see ``program``)."""

    def registers(self) -> list[Value]:
        """Returns all registers in a list, for ``Instructions.loop``."""
        return [self.running_max, self.running_sum, *self.accumulator]


def empty_softmaxes(isa: Instructions, shape: Shape) -> list[OnlineSoftmax]:
    """Returns, for each octet, the softmax over no positions."""
    zero = isa.constant(0.0, "f32")
    masked = isa.constant(MASKED_SCORE, "f32")
    return [OnlineSoftmax(masked, zero, [zero] * (shape.accumulated // 4)) for _ in range(shape.octets)]


def to_registers(softmaxes: list[OnlineSoftmax]) -> list[Value]:
    """Returns the registers of all softmaxes."""
    return [register for softmax in softmaxes for register in softmax.registers()]


def from_registers(registers: list[Value], shape: Shape) -> tuple[list[OnlineSoftmax], list[Value]]:
    """Inverts ``to_registers``; also returns the registers that follow."""
    size = 2 + shape.accumulated // 4
    ends = [size * (octet + 1) for octet in range(shape.octets)]
    each = [registers[end - size : end] for end in ends]
    return [OnlineSoftmax(one[0], one[1], one[2:]) for one in each], registers[ends[-1] :]


def attend(
    isa: Instructions,
    shape: Shape,
    queries: Queries,
    softmaxes: list[OnlineSoftmax],
    keys: list[Value],
    load_values: Callable[[], list[Value]],
    valid: list[list[Value]],
) -> list[OnlineSoftmax]:
    """Attends to 16 positions and returns the new softmaxes. No row affects another.

    Args:
      isa: The instructions.
      shape: Static sizes.
      queries: The lane's words of its query rows.
      softmaxes: Softmax over the previous positions, for each octet of query rows.
      keys: The lane's words of its ``LANE_KEYS`` keys.
      load_values: Returns the lane's words of the values at its ``LANE_VALUES`` positions; called after the
        scores.
      valid: Whether each of the ``LANE_VALUES`` positions exists for the row, for each octet.
    """
    zero, empty = isa.constant(0.0, "f32"), isa.constant(0)
    per_key, per_value = shape.words_per_key, shape.words_per_value
    each_key = [keys[k * per_key : (k + 1) * per_key] for k in range(LANE_KEYS)]
    pairs = [range(first, min(first + 2, shape.octets)) for first in range(0, shape.octets, 2)]
    results = []
    for pair in pairs:
        scores = _scores(isa, [queries(octet) for octet in pair], each_key, zero, empty)
        results += [
            _weights(isa, shape, softmaxes[octet], row_scores, valid[octet], zero)
            for octet, row_scores in zip(pair, scores, strict=True)
        ]
    new, factors, weights = zip(*results, strict=True)
    words = load_values()
    values = [words[v * per_value : (v + 1) * per_value] for v in range(len(LANE_VALUES))]
    for block in range(shape.accumulated // 8):
        word, selector = block // 2, (0x5410, 0x7632)[block % 2]
        operand = [isa.permute_bytes(values[v][word], values[v + 1][word], selector) for v in (0, 2)]
        for pair in pairs:
            sums = [
                a * factors[octet]
                for octet in pair
                for a in softmaxes[octet].accumulator[2 * block : 2 * block + 2]
            ]
            heads = _interleaved([weights[octet] for octet in pair], empty)
            sums = isa.matrix_multiply_add_bfloat16([*sums, zero, zero][:4], heads, operand)
            for i, octet in enumerate(pair):
                new[octet].accumulator += sums[2 * i : 2 * i + 2]
    return list(new)


def _scores(
    isa: Instructions, queries: list[list[Value]], keys: list[list[Value]], zero: Value, empty: Value
) -> list[list[Value]]:
    """Returns the unscaled scores of the lane's positions, for the query rows of one or two octets."""
    scores: list[list[Value]] = [[] for _ in queries]
    for key in keys:
        sums = [zero] * 4
        for i in range(0, len(key), 2):
            heads = _interleaved([row[i : i + 2] for row in queries], empty)
            sums = isa.matrix_multiply_add_bfloat16(sums, heads, key[i : i + 2])
        for octet, row in enumerate(scores):
            row += sums[2 * octet : 2 * octet + 2]
    return scores


def _interleaved(octets: list[list[Value]], empty: Value) -> list[Value]:
    """Returns operand A of the matrix unit for two words of one or two octets; a missing octet is 0."""
    low = octets[0]
    high = octets[1] if len(octets) == 2 else [empty, empty]
    return [low[0], high[0], low[1], high[1]]


def _weights(
    isa: Instructions,
    shape: Shape,
    softmax: OnlineSoftmax,
    scores: list[Value],
    valid: list[Value],
    zero: Value,
) -> tuple[OnlineSoftmax, Value, list[Value]]:
    """Returns the new softmax without weighted values, their factor, and the packed weights of the step."""
    unit = math.log2(math.e) * shape.score_scale
    if shape.soft_cap is not None:
        unit = math.log2(math.e) * shape.soft_cap
        scores = [_tanh(isa, score * (shape.score_scale / shape.soft_cap)) for score in scores]
    masked = isa.constant(MASKED_SCORE, "f32")
    scores = [isa.select(ok, score * unit, masked) for ok, score in zip(valid, scores, strict=True)]
    running_max = softmax.running_max
    for score in scores:
        running_max = larger(isa, running_max, score)
    for distance in (1, 2):
        running_max = larger(isa, running_max, isa.shuffle_xor(running_max, distance))
    factor = isa.exp2(softmax.running_max - running_max)
    weights = [isa.select(ok, isa.exp2(s - running_max), zero) for ok, s in zip(valid, scores, strict=True)]
    running_sum = softmax.running_sum * factor
    for weight in weights:
        running_sum = running_sum + weight
    packed = [isa.pack_bfloat16(*weights[:2]), isa.pack_bfloat16(*weights[2:])]
    return OnlineSoftmax(running_max, running_sum, []), factor, packed


def _tanh(isa: Instructions, x: Value) -> Value:
    """Returns ``tanh(x)`` with an absolute error of about 1e-7; ``tanh.approx`` of PTX has 5e-4."""
    power = isa.exp2(x * (2 * math.log2(math.e)))
    return isa.constant(1.0, "f32") - isa.reciprocal(power + 1.0) * 2.0


def larger(isa: Instructions, a: Value, b: Value) -> Value:
    """Returns the larger of two ``f32``."""
    return isa.select(a < b, b, a)
