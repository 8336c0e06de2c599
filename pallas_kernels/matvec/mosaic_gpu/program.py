"""The lane program of the graded matvec. Start here to understand the kernel.

For the activation row the kernel computes

    y[n] = sum_g scales[g, n] * sum_{k in group g} x[k] * sum_{f < level_k} (d_f[k, n] - 3/2) 4**-f

which is the definition in ``weight.NestedWeight``, because ``0.5 * 4**(1 - l) - 2 = -3/2 sum_{f < l} 4**-f``.
The time of a launch is the time to read the digits. The kernel therefore reads only the digits that levels
reach, and keeps many reads in flight.

Storage and division of work
============================

    planes[f]           tile 0          tile 1       ...     one plane; a row = one input channel
                   +---------------+---------------+
    channel 0      | 128 bytes     |               |         a row in a tile: 512 digits of 2 bits in 32
    channel 1      |   skipped     |               |         words, read as a whole or skipped
       ...         |               |               |
    channel 127    +---------------+---------------+  group 0: one scale for each output
    channel 128    |               |               |
       ...         +---------------+---------------+  group 1

The last tile of a row may be narrower (see ``tile``).

    CTA        one tile of outputs, ``groups_per_cta`` groups of channels
    warp       128 / ``warps_per_group`` channels of one group; a warp has its own list of plane rows to read
               and does not wait for other warps until the last phase
    step       8 plane rows = 1 KiB, which fill one slot of the warp's ring buffer in shared memory

Phases
======
fetch     Loads thresholds and activations into registers, and starts copying scales to shared memory.
grade     Compares ``|x|`` with the thresholds, one plane at a time.
list      Lists the rows of plane 0 that the activations reach. An entry starts with the offset of its
          plane row. The offset is enough to copy the row, so the first copies start here.
compact   Completes the list with the other planes and with codes; an entry is (offset, code of x * 4**-f).
          x is multiplied by the gain of its level. A code is an integer in units of ``peak / 32512``, where
          the *peak* of a warp is the largest ``|x|`` of its channels times the largest gain.
stream    Copies the listed rows to the ring, ``ring_slots - 1`` steps ahead of the multiplication.
multiply  Multiplies each step on the matrix unit, exactly, in int32.
combine   Converts the integer sums to float32: joins their bytes and subtracts the midpoints.
reduce    Applies the scales, sums over the CTA's warps in a fixed order, and writes the CTA's partial sum.

The last CTAs of the grid, one for each activation row, run ``count_levels`` instead, which computes the
statistics of the row. They finish long before the others, and save a second kernel that adds up counts.

Multiplication
==============
``layout`` defines the order of the outputs in a tile. A mask selects the digits at one position of each byte:

    word          31  ..  24 23  ..  16 15  ..   8  7 6 5 4 3 2 1 0      16 digits, 4 in each byte
    & 0c0c0c0ch                                         d d             digit position p = 1: the byte is 4 d
    & 30303030h                                     d d                 p = 2: the byte is 16 d
    & c0c0c0c0h                                 d d                     p = 3: the byte is 64 d
    unmasked                                    d d d d d d d d         the sum of p = 0, 1, 2, 3

The bytes of the masked words are the operand A [16 words, 32 = 8 plane rows x 4 bytes] of the matrix unit,
without shifts or transposes. ``combine`` divides by 4**p and separates p = 0.

The operand B [32, 8] holds the codes. A code has 16 bits, a high byte and a low byte. The rows of B for byte
b of the words hold the high byte in column 2 b, the low byte in column 2 b + 1, and zeros elsewhere. Thus one
instruction multiplies 8 plane rows x 64 outputs; two halves of the words and four digit positions make a
tile. A lane ends up with the sums of both bytes for its outputs. All planes share the accumulators, because
the list holds codes of x * 4**-f.

The midpoints cost no extra pass: ``combine`` subtracts 3/2 times the sum of all codes in the list.

A channel whose x is NaN or Inf reaches every level and becomes the peak of its warp. The warp multiplies its
sums by the peak, so every output becomes NaN or Inf.

The program reads the weights once for each activation row. ``byte_pairs`` and ``dense_rows`` multiply
several rows with one read.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.lane_context import Refs, lane_context
from pallas_kernels.matvec.mosaic_gpu.listing import (
    RowList,
    compact,
    fetch,
    grade,
    list_first_plane,
    store_record,
)
from pallas_kernels.matvec.mosaic_gpu.reduction import combine, copy_scales, end_addresses, reduce
from pallas_kernels.matvec.mosaic_gpu.streaming import Copies, stream


def graded_matvec_program(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """Runs the phases in a CTA that multiplies."""
    context = lane_context(isa, geometry, refs)
    operands = fetch(isa, geometry, refs, context)
    copy_scales(isa, geometry, refs, context)
    first = grade(isa, operands, 0)
    rows = RowList(isa, geometry, context, end=context.list)
    addresses = list_first_plane(isa, geometry, rows, first)
    copies = Copies.create(isa, geometry, refs, context)
    started = copies.start(rows.whole_steps())
    listed = compact(isa, geometry, operands, first, addresses, rows)
    copies.fill_ring(started, listed.steps)
    store_record(isa, geometry, context, listed)
    ends = end_addresses(isa, geometry, context)
    accumulators = stream(isa, geometry, context, copies, listed.steps)
    outputs = combine(isa, ends, accumulators)
    reduce(isa, geometry, refs, context, ends, outputs)
