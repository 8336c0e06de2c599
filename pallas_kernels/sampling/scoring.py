"""The first launch of sampling: adjusts and scales the logits, and computes statistics of chunks of tokens.

A warp has a chunk of 128 tokens. It adds biases, applies penalties and the mask, divides by the temperature,
and writes the scaled logits as ordered keys, and ``candidates.STATISTICS``. It also adds the noise and finds
the best candidate of the chunk, except in rows for which the second launch lists the candidates.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.sampling import noise
from pallas_kernels.sampling.candidates import (
    LANE_TOKENS,
    LARGEST,
    LISTED_K,
    NO_KEY,
    SCORING_WARPS,
    STATISTICS,
    Candidate,
    Inputs,
    Shape,
    best_of_warp,
    better,
    key_address,
    key_of,
    lane_index,
    load,
    no_candidate,
    number_of,
    token_of,
    warp_max_key,
)

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Arrays of the launch.

    Attributes:
      inputs: See ``Inputs``.
      keys: Output, int32 ``[rows, chunks, CHUNK]``: scaled logits as keys, ``NO_KEY`` after the last token;
        see ``candidates.key_address``.
      statistics: Output, int32 ``[rows, STATISTICS, chunks]``.
      shared: The shared memory, not used.
    """

    inputs: Inputs
    keys: Any
    statistics: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class Element:
    """One of the lane's tokens."""

    exists: Value
    token: Value
    scaled: Value
    key: Value


def scoring_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    block, thread = isa.block_index(), isa.thread_index()
    row, lane = block // shape.blocks_per_row, thread & (LANES - 1)
    chunk = block % shape.blocks_per_row * SCORING_WARPS + (thread >> 5)
    first = lane_index(isa, shape, chunk, lane)
    factor = _factor(isa, refs.inputs, row)
    elements = [_element(isa, shape, refs.inputs, row, first + e * LANES, factor) for e in range(LANE_TOKENS)]
    address = key_address(isa, shape, refs.keys, row, chunk, lane)
    isa.store_global(address, [element.key for element in elements])
    largest = elements[0].key
    for element in elements[1:]:
        largest = isa.select(largest < element.key, element.key, largest)
    largest = warp_max_key(isa, largest)
    zero, total = isa.constant(0.0, "f32"), isa.constant(0.0, "f32")
    for element in elements:
        weight = isa.exp2((element.scaled - number_of(isa, largest)) * LOG2_E)
        total = total + isa.select(element.exists, weight, zero)
    for distance in (1, 2, 4, 8, 16):
        total = total + isa.shuffle_xor(total, distance)
    score, token, key = best_of_warp(isa, _best_of_lane(isa, refs.inputs, row, elements))
    words = [largest, isa.float_to_bits(total), isa.float_to_bits(score), token, key]
    with isa.when(lane.equals(0)):
        for i, word in enumerate(words):
            index = (row * STATISTICS + i) * shape.chunks + chunk
            isa.store_global(isa.global_address(refs.statistics) + isa.widen(index << 2), [word])


def _factor(isa: Instructions, inputs: Inputs, row: Value) -> Value:
    """Returns the inverse of the temperature; 1 if the row is greedy."""
    one = isa.constant(1.0, "f32")
    temperature = load(isa, inputs.temperature, row, "f32")
    return isa.divide(one, isa.select(isa.constant(0.0, "f32") < temperature, temperature, one))


def _element(
    isa: Instructions, shape: Shape, inputs: Inputs, row: Value, index: Value, factor: Value
) -> Element:
    """Returns the token of logit ``index``, with its logit after all changes, times ``factor``."""
    exists = index < shape.vocabulary
    index = isa.select(exists, index, isa.constant(0))
    number = load(isa, inputs.logits, row * shape.vocabulary + index, "f32")
    token = token_of(isa, shape, inputs, index)
    by_token = row * shape.vocabulary + token
    if shape.biased:
        number = number + load(isa, inputs.bias, by_token, "f32")
    if shape.penalized:
        number = _penalized(isa, inputs, row, by_token, number)
    if shape.masked:
        word = load(isa, inputs.allowed, row * shape.mask_words + (token >> 5))
        allowed = ((word >> (token & 31)) & 1).equals(1)
        number = isa.select(allowed, number, isa.constant(-LARGEST, "f32"))
    scaled = number * factor
    # Comparisons with NaN are false, so a NaN becomes the largest number.
    scaled = isa.select(scaled < LARGEST, scaled, isa.constant(LARGEST, "f32"))
    scaled = isa.select(scaled < -LARGEST, isa.constant(-LARGEST, "f32"), scaled)
    scaled = scaled + 0.0  # A negative zero becomes positive.
    return Element(exists, token, scaled, isa.select(exists, key_of(isa, scaled), isa.constant(NO_KEY)))


def _penalized(isa: Instructions, inputs: Inputs, row: Value, by_token: Value, number: Value) -> Value:
    """Returns a logit after the penalties."""
    repetition = load(isa, inputs.repetition, row, "f32")
    presence = load(isa, inputs.presence, row, "f32")
    frequency = load(isa, inputs.frequency, row, "f32")
    history = load(isa, inputs.history, by_token)
    zero = isa.constant(0.0, "f32")
    repeated = isa.select(zero < number, isa.divide(number, repetition), number * repetition)
    number = isa.select(history.equals(0), number, repeated)
    occurrences = history >> 1
    number = number - isa.select(occurrences.equals(0), zero, presence)
    return number - frequency * isa.int_to_float(occurrences)


def _best_of_lane(isa: Instructions, inputs: Inputs, row: Value, elements: list[Element]) -> Candidate:
    """Returns the lane's best candidate; one with an infinite score and no token if the row is not scored."""
    zero, one = isa.constant(0), isa.constant(1)
    k, temperature = load(isa, inputs.top_k, row), load(isa, inputs.temperature, row, "f32")
    listed = (zero < k) & (k < LISTED_K + 1)
    scored = (isa.constant(0.0, "f32") < temperature) & ~listed

    def add_noise(_, best):
        key = noise.row_key(isa, load(isa, inputs.seed, row), load(isa, inputs.position, row))
        for element in elements:
            score = element.scaled + noise.gumbel(isa, key, element.token)
            score = isa.select(element.exists, score, isa.constant(-float("inf"), "f32"))
            best = better(isa, (score, element.token, element.key), tuple(best))
        return list(best)

    score, token, key = isa.loop(isa.select(scored, one, zero), list(no_candidate(isa)), add_noise)
    return isa.select(scored, score, isa.constant(float("inf"), "f32")), token, key
