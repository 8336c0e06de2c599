"""The lane program of a router: scores, the best experts, and their probabilities, in one launch.

A cluster of CTAs computes one row. A row's time is the latency of its loads, so the router's kernel (0.5 MB
for 2048 channels and 128 experts) is spread over 8 multiprocessors, and all its loads are in flight together.

    score    Every thread multiplies some input channels with a vector of experts. The CTA adds up its
             threads, and stores its part of the scores in the shared memory of the cluster's first CTA.
    choose   After the barrier of the cluster, one warp of the first CTA adds up the parts, each lane for
             neighbouring experts. It takes the best expert, then the best of the others, and so on.

Scores are compared by *keys*: 32-bit integers in the order of the floats, in which 0 is below every score.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import sum_partials, unpack_bfloat16
from pallas_kernels.router.geometry import CLUSTER, LOADS_IN_FLIGHT, VECTOR, RouterGeometry
from pallas_kernels.router.grading_factor import inverse_grading_factor

SIGN = 0x80000000


@dataclasses.dataclass(frozen=True)
class RouterRefs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[rows, features]``, before the factor of the norm.
      square_partials: float32 ``[rows, S]``; their sum is the mean square of a row. Not read without a norm.
      kernel: bfloat16 or float32 ``[features, experts]``. float32 is rounded to bfloat16.
      experts: Output, int32 ``[rows, chosen]``: those with the largest scores first, equal ones in ascending
        order.
      probabilities: Output, float32 ``[rows, chosen]``.
      mean_squares: Output, float32 ``[rows, chosen]``: the mean square plus epsilon of each row (1 without a
        norm), divided by the square of each expert's grading factor.
      shared: The shared memory.
      bias: float32 ``[experts]`` that is added to the scores; None for none.
    """

    x: Any
    square_partials: Any
    kernel: Any
    experts: Any
    probabilities: Any
    mean_squares: Any
    shared: Any
    bias: Any = None


def router_program(isa: Instructions, g: RouterGeometry, refs: RouterRefs) -> None:
    """Runs the whole program of one lane."""
    block, thread = isa.block_index(), isa.thread_index()
    row, rank = block // CLUSTER, block % CLUSTER
    mean_square = isa.constant(1.0, "f32")
    if g.num_square_partials:
        mean_square = sum_partials(isa, refs.square_partials, row, g.num_square_partials) + g.eps
    partials = partial_scores(isa, g, refs, row, rank, thread)
    send_scores(isa, g, refs, partials, rank, thread)
    isa.cluster_barrier()
    with isa.when((rank.equals(0)) & (thread < LANES)):
        keys = score_keys(isa, g, refs, thread, mean_square)
        choose(isa, g, refs, keys, row, thread, mean_square)


def partial_scores(
    isa: Instructions, g: RouterGeometry, refs: RouterRefs, row: Value, rank: Value, thread: Value
) -> list[Value]:
    """Returns the scores of the thread's experts, f32 ``[vector_experts]``, over its input channels.

    ptxas 13.0 moves loads to their uses, and few loads would be in flight together. The uses here depend on
    activations that pass through shared memory, so ptxas cannot move them, nor the loads, over the barrier.
    """
    column, band = thread % g.columns, thread // g.columns
    if g.used_columns != g.columns:
        column = isa.select(column < g.used_columns, column, isa.constant(0))
    kernel = isa.global_address(refs.kernel) + isa.widen(column * (4 * g.vector_words))
    staged = load_activations(isa, g, refs, row, rank, thread)
    x = isa.shared_address(refs.shared) + (g.x_base + (band * (2 * g.band_channels)))
    scores = [isa.constant(0.0, "f32")] * g.vector_experts
    for first in range(0, g.band_channels, LOADS_IN_FLIGHT):
        channels = range(first, min(first + LOADS_IN_FLIGHT, g.band_channels))
        vectors = [load_vector(isa, g, kernel, rank, band, channel) for channel in channels]
        if first == 0:
            store = isa.shared_address(refs.shared) + (g.x_base + (thread << 4))
            isa.store_shared(store, staged, where=thread < g.staged_channels // VECTOR)
        isa.block_barrier()
        for i in range(0, len(channels), VECTOR):
            words = isa.load_shared(x + 2 * (first + i), VECTOR // 2)
            numbers = [number for word in words for number in unpack_bfloat16(isa, word)]
            for number, vector in zip(numbers, vectors[i : i + VECTOR], strict=True):
                weights = unpack_weights(isa, g, vector)
                scores = [isa.multiply_add(number, w, s) for w, s in zip(weights, scores, strict=True)]
    return scores


def load_activations(
    isa: Instructions, g: RouterGeometry, refs: RouterRefs, row: Value, rank: Value, thread: Value
) -> list[Value]:
    """Loads the ``VECTOR`` activations that the thread stages in shared memory; zeros in padding."""
    in_slice = thread * VECTOR
    channel = rank * g.slice_channels + in_slice
    exists = (in_slice < g.slice_channels) & (channel < g.features)
    address = isa.widen((row * g.features + isa.select(exists, channel, isa.constant(0))) << 1)
    words = isa.load_global(isa.global_address(refs.x) + address, VECTOR // 2, ordered=True)
    return [isa.select(exists, word, isa.constant(0)) for word in words]


def load_vector(
    isa: Instructions, g: RouterGeometry, kernel: Value, rank: Value, band: Value, channel: int
) -> list[Value]:
    """Loads the vector of one input channel of the thread; of channel 0 in padding.

    Args:
      isa, g: Instructions and sizes.
      kernel: Address of the thread's column.
      rank: Index of the CTA in its cluster.
      band: Index of the thread's band.
      channel: Index of the input channel in the band.
    """
    in_slice = band * g.band_channels + channel
    index = rank * g.slice_channels + in_slice
    if g.has_padding:
        exists = (in_slice < g.slice_channels) & (index < g.features)
        index = isa.select(exists, index, isa.constant(0))
    return isa.load_global(kernel + isa.widen(index * g.row_bytes), g.vector_words, ordered=True)


def unpack_weights(isa: Instructions, g: RouterGeometry, vector: list[Value]) -> list[Value]:
    """Returns the numbers of a vector of the kernel as bfloat16 in ``f32``."""
    if g.kernel_bytes == 4:
        floats = [isa.bits_to_float(word) for word in vector]
        pairs = zip(floats[::2], floats[1::2], strict=True)
        vector = [isa.pack_bfloat16(*pair) for pair in pairs]
    return [w for word in vector for w in unpack_bfloat16(isa, word)][: g.vector_experts]


def send_scores(
    isa: Instructions, g: RouterGeometry, refs: RouterRefs, scores: list[Value], rank: Value, thread: Value
) -> None:
    """Adds up the scores over the CTA, and stores them in the first CTA of the cluster."""
    shared = isa.shared_address(refs.shared)
    distance = g.columns
    while distance < LANES:
        scores = [score + isa.shuffle_xor(score, distance) for score in scores]
        distance *= 2
    # Without shuffles every thread has a partial sum; otherwise the first lanes of each warp have one.
    index = thread
    if g.columns < LANES:
        index = (thread >> 5) * g.columns + (thread & (g.columns - 1))
    words = [isa.float_to_bits(score) for score in scores]
    address = shared + index * (4 * g.vector_experts)
    with isa.when((thread & (LANES - 1)) < g.columns):
        for i in range(0, len(words), 4):
            isa.store_shared(address + 4 * i, words[i : i + 4])
    isa.block_barrier()
    padded = LANES * g.experts_per_lane
    for first in range(0, padded, g.threads):
        expert = thread + first
        with isa.when(expert < padded):
            # Padding gets the score of expert 0, which ``score_keys`` ignores.
            read = shared + (isa.select(expert < g.experts, expert, isa.constant(0)) << 2)
            total = isa.constant(0.0, "f32")
            for partial in range(g.partial_rows):
                total = total + isa.load_shared(read + 4 * partial * g.partial_experts, 1, "f32")[0]
            target = shared + (g.gathered_base + rank * g.gathered_bytes) + (expert << 2)
            isa.store_cluster(target, 0, [isa.float_to_bits(total)])


def score_keys(
    isa: Instructions, g: RouterGeometry, refs: RouterRefs, lane: Value, mean_square: Value
) -> list[Value]:
    """Returns the keys of the lane's experts, i32 ``[experts_per_lane]``; 0 for padding."""
    each, shared = g.experts_per_lane, isa.shared_address(refs.shared)
    width = min(each, 4)
    scores = [isa.constant(0.0, "f32")] * each
    for rank in range(CLUSTER):
        address = shared + (g.gathered_base + rank * g.gathered_bytes) + lane * (4 * each)
        parts = [v for i in range(0, each, width) for v in isa.load_shared(address + 4 * i, width, "f32")]
        scores = [score + part for score, part in zip(scores, parts, strict=True)]
    if g.num_square_partials:
        factor = isa.rsqrt(mean_square)
        scores = [score * factor for score in scores]
    if g.biased:
        scores = [score + bias for score, bias in zip(scores, load_bias(isa, g, refs, lane), strict=True)]
    keys = []
    for i, score in enumerate(scores):
        bits = isa.float_to_bits(score + 0.0)  # -0 becomes 0, which has another key.
        key = isa.maximum(isa.select(bits < 0, bits ^ 0xFFFFFFFF, bits ^ SIGN), isa.constant(1))
        keys.append(isa.select(lane * each + i < g.experts, key, isa.constant(0)))
    return keys


def load_bias(isa: Instructions, g: RouterGeometry, refs: RouterRefs, lane: Value) -> list[Value]:
    """Loads the biases of the lane's experts, f32 ``[experts_per_lane]``; that of expert 0 in padding."""
    base, biases = isa.global_address(refs.bias), []
    for i in range(g.experts_per_lane):
        expert = lane * g.experts_per_lane + i
        index = isa.select(expert < g.experts, expert, isa.constant(0))
        biases += isa.load_global(base + isa.widen(index << 2), kind="f32")
    return biases


def score_of(isa: Instructions, key: Value) -> Value:
    """Returns the score of a key."""
    return isa.bits_to_float(isa.select(key < 0, key ^ SIGN, key ^ 0xFFFFFFFF))


def choose(
    isa: Instructions,
    g: RouterGeometry,
    refs: RouterRefs,
    keys: list[Value],
    row: Value,
    lane: Value,
    mean_square: Value,
) -> None:
    """Stores the chosen experts, and what follows from their scores."""
    output = isa.widen(row * (4 * g.chosen))
    to_log2 = math.log2(math.e)
    zero = isa.constant(0)
    remaining, chosen_key, largest = list(keys), zero, zero
    for i in range(g.chosen):
        best_of_lane = remaining[0]
        for key in remaining[1:]:
            best_of_lane = isa.maximum(best_of_lane, key)
        best = isa.reduce_max(best_of_lane)
        has_best = best_of_lane.equals(best)
        holders = isa.ballot(has_best)
        # A lane has neighbouring experts, so the lowest lane has the lowest of equal experts.
        wins = has_best & (holders & isa.lower_lanes()).equals(0)
        index = zero
        for j in reversed(range(len(remaining))):
            index = isa.select(remaining[j].equals(best), isa.constant(j), index)
        remaining = [isa.select(wins & index.equals(j), zero, key) for j, key in enumerate(remaining)]
        with isa.when(wins):
            address = isa.global_address(refs.experts) + output + 4 * i
            isa.store_global(address, [lane * g.experts_per_lane + index])
        chosen_key = isa.select(lane.equals(i), best, chosen_key)
        largest = best if i == 0 else largest
    highest = score_of(isa, largest)

    def weight(key: Value) -> Value:
        """Returns ``exp(score - largest score)``; 0 for the key 0."""
        exponential = isa.exp2((score_of(isa, key) - highest) * to_log2)
        return isa.select(key.equals(0), isa.constant(0.0, "f32"), exponential)

    numerator = weight(chosen_key)
    total = numerator
    if not g.normalized:
        total = weight(keys[0])
        for key in keys[1:]:
            total = total + weight(key)
    for distance in (1, 2, 4, 8, 16):
        total = total + isa.shuffle_xor(total, distance)
    probability = isa.divide(numerator, total)
    inverse = inverse_grading_factor(isa, probability)
    with isa.when(lane < g.chosen):
        offset = output + isa.widen(lane << 2)
        isa.store_global(isa.global_address(refs.probabilities) + offset, [probability])
        isa.store_global(isa.global_address(refs.mean_squares) + offset, [mean_square * inverse * inverse])
