"""Merging the softmaxes of the warps of a split, and, in a second launch, of all splits."""

import dataclasses
import math
from typing import Any

from pallas_kernels.decode_attention.lane_context import (
    CHUNK,
    OCTET,
    THREADS,
    WARPS,
    LaneContext,
    Refs,
    Shape,
)
from pallas_kernels.decode_attention.online_softmax import OnlineSoftmax, larger
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import Rows, load_pair, locate, store_rounded


def merge_in_block(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    softmaxes: list[OnlineSoftmax],
    context: LaneContext,
    shared: Value,
) -> None:
    """Merges the softmaxes of the warps in shared memory, octet by octet; writes the results of the split."""
    for octet, softmax in enumerate(softmaxes):
        if octet:
            isa.block_barrier()  # This octet writes the shared memory of the one before.
        _merge_octet(isa, shape, refs, softmax, context, shared, octet)


def _merge_octet(
    isa: Instructions,
    shape: Shape,
    refs: Refs,
    state: OnlineSoftmax,
    context: LaneContext,
    shared: Value,
    octet: int,
) -> None:
    thread, warp, dim, rows = context.thread, context.warp, shape.head_dim, shape.merged_rows
    softmax, accumulators = shared + shape.softmax_base, shared + shape.accumulator_base
    total = state.running_sum
    for distance in (1, 2):
        total = total + isa.shuffle_xor(total, distance)
    is_row, index = context.row < rows, warp * rows + context.row
    isa.store_shared(softmax + index * 8, [state.running_max, total], is_row & context.column.equals(0))
    for chunk in range(shape.accumulated // CHUNK):
        left = dim - chunk * CHUNK
        stores = is_row if left >= CHUNK else is_row & (context.column < left // 16)
        # Over the 8 blocks of a chunk, elements 2 column and 2 column + 1 are 16 consecutive values.
        for half in range(2):
            target = accumulators + index * (4 * dim) + context.column * 64 + (chunk * CHUNK + half * 8) * 4
            run = [state.accumulator[2 * (chunk * 8 + block) + half] for block in range(8)]
            isa.store_shared(target, run[:4], stores)
            isa.store_shared(target + 16, run[4:], stores)
    isa.block_barrier()
    first_row = None
    if shape.tokens > 1:
        first_row = isa.constant(OCTET * octet)
        if context.first_row is not None:
            first_row = context.first_row + OCTET * octet
    for begin in range(0, rows * dim, THREADS):
        item = thread + begin
        exists = item < rows * dim
        if first_row is not None:
            exists = exists & (item < (isa.constant(shape.rows) - first_row) * dim)
        with isa.when(exists):
            row, value = item // dim, item % dim
            pairs = [isa.load_shared(softmax + (row + w * rows) * 8, 2, "f32") for w in range(WARPS)]
            running_max = pairs[0][0]
            for warp_max, _ in pairs[1:]:
                running_max = larger(isa, running_max, warp_max)
            running_sum, accumulator = isa.constant(0.0, "f32"), isa.constant(0.0, "f32")
            for w, (warp_max, warp_sum) in enumerate(pairs):
                factor = isa.exp2(warp_max - running_max)
                address = accumulators + (row + w * rows) * (4 * dim) + value * 4
                (warp_accumulator,) = isa.load_shared(address, 1, "f32")
                running_sum = isa.multiply_add(factor, warp_sum, running_sum)
                accumulator = isa.multiply_add(factor, warp_accumulator, accumulator)
            out = context.part * (shape.rows * dim) + item
            if first_row is not None:
                out = out + first_row * dim
            isa.store_global(isa.global_address(refs.accumulators) + isa.widen(out << 2), [accumulator])
            with isa.when(value.equals(0)):
                pair = context.part * shape.rows + row
                if first_row is not None:
                    pair = pair + first_row
                address = isa.global_address(refs.softmax) + isa.widen(pair << 3)
                isa.store_global(address, [running_max, running_sum])


@dataclasses.dataclass(frozen=True)
class MergeRefs:
    """Arrays of the second launch.

    Attributes:
      accumulators, softmax: See ``lane_context.Refs``.
      outputs: Output, bfloat16 ``[B * T, heads * D]``.
      shared: The shared memory, not used.
      sinks: float32 ``[heads]``: the sink of each query head; None without sinks.
    """

    accumulators: Any
    softmax: Any
    outputs: Any
    shared: Any
    sinks: Any = None


def merge_program(isa: Instructions, shape: Shape, rows: Rows, refs: MergeRefs) -> None:
    """Merges the softmaxes of all splits: ``sum(f * accumulator) / sum(f * running_sum)``.

    Both sums run over the splits, with ``f = 2**(running_max - largest running_max)``. A sink is a score of
    which only the weight counts, in the second sum.
    """
    pair = locate(isa, rows)
    head, value = pair.feature // shape.head_dim, pair.feature % shape.head_dim
    kv_head, query = head // shape.queries_per_kv, head % shape.queries_per_kv
    sequence = pair.row
    if shape.tokens > 1:
        sequence, query = pair.row // shape.tokens, pair.row % shape.tokens * shape.queries_per_kv + query
    first = (sequence * shape.kv_heads + kv_head) * (shape.splits * shape.rows) + query
    indices = [first + split * shape.rows for split in range(shape.splits)]
    softmax = [load_pair(isa, refs.softmax, index * 2) for index in indices]
    accumulators = [load_pair(isa, refs.accumulators, index * shape.head_dim + value) for index in indices]
    sink = None
    if refs.sinks is not None:
        (sink,) = isa.load_global(isa.global_address(refs.sinks) + isa.widen(head << 2), kind="f32")
    largest = softmax[0][0]
    for split_max, _ in softmax[1:]:
        largest = larger(isa, largest, split_max)
    zero = isa.constant(0.0, "f32")
    total, low, high = zero, zero, zero
    if sink is not None:
        sink = sink * math.log2(math.e)
        largest = larger(isa, largest, sink)
        total = isa.exp2(sink - largest)
    for (split_max, split_sum), (a, b) in zip(softmax, accumulators, strict=True):
        factor = isa.exp2(split_max - largest)
        total = isa.multiply_add(factor, split_sum, total)
        low, high = isa.multiply_add(factor, a, low), isa.multiply_add(factor, b, high)
    store_rounded(isa, rows, pair, refs.outputs, [isa.divide(a, total) for a in (low, high)])
