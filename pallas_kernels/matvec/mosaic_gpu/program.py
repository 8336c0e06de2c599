"""The lane program of the graded matvec: what each lane does, phase by phase.

    y[n] = sum_s scales[s, n] * sum_{k in slice s} x[k] * sum_{f < level_k} (d_f[k, n] - 3/2) 4**-f

which is ``weight.NestedWeight``'s definition, since ``0.5 * 4**(1 - l) - 2 = -3/2 sum_{f < l} 4**-f``.

Storage, and who reads what
===========================

    planes[f]           tile 0          tile 1       ...      one plane; a row = one input channel
                   +---------------+---------------+
    channel 0      | 128 bytes     |               |          a row in a tile: 512 digits of 2 bits,
    channel 1      |   skipped     |               |          32 words; read in one piece, or not at all
       ...         |               |               |
    channel 127    +---------------+---------------+  slice 0 : one scale per output, one list of rows
    channel 128    |               |               |
       ...         +---------------+---------------+  slice 1

    CTA        one tile x `slices_per_cta` slices, up to 4 activation rows
    warp       its own channels, 128 / `warps_per_slice` of a slice; on its own until the last phase
    step       8 rows = 1 KiB, one slot of the warp's ring

Phases
======
fetch    thresholds and activations from global memory into registers; scales on their way to shared memory
grade    level of each channel and activation row by comparison, one plane at a time
list     the rows of plane 0 that are reached, in shared memory: to copy a row its offset is enough, so the
         first are on their way to the ring before anything else is known
compact  the finished list, of all planes: (offset of the row, x 4**-f); x is times its level's gain, and
         rounded on a grid that the largest |x| of the warp's channels, its *peak*, decides
stream   copy listed rows into the ring, `ring_slots - 1` steps ahead ...
multiply ... and multiply each step on the matrix unit, exactly, in int32
combine  integers to float32: bytes joined, midpoints subtracted
reduce   scales applied, sum over the CTA's warps in a fixed order, one partial sum per CTA to global memory

The last CTAs, one per activation row, only count the row's levels (`count_levels`): they are done long before
the others, and no other kernel has to add up counts.

The multiply (see ``layout`` for the order of outputs in a tile)
================================================================

    word          31  ..  24 23  ..  16 15  ..   8  7 6 5 4 3 2 1 0      16 digits, 4 to a byte
    & 0c0c0c0ch                                         d d             digit position p = 1: the byte is 4 d
    & 30303030h                                     d d                 p = 2: 16 d
    & c0c0c0c0h                                 d d                     p = 3: 64 d
    all of it                                   d d d d d d d d         the sum of p = 0, 1, 2, 3

Masked words go to the matrix unit as they are, as bytes of A [16 words, 32 = 8 list rows x 4 bytes]: no
shifts, no transposes. The factor 4**p is taken out, and p = 0 separated, at the end.

B [32, 8] holds x, rounded to 16 bits on the grid ``peak / 32512``, split into a high and a low byte: columns
2 b and 2 b + 1 have the high and the low byte of x where k's byte position is b, and zeros elsewhere. So one
instruction multiplies 8 rows x 64 outputs, 2 word groups x 4 digit positions make a tile, and a lane ends up
with both bytes' sums of its outputs. All planes go into the same accumulators, because the list holds
x * 4**-f.

The midpoints need no extra pass: the sum of everything the list holds, times 3/2, is subtracted.

A NaN or Inf in x is read at every level, becomes the peak of its warp, and so the factor that every output
of the warp is multiplied by.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.matvec.mosaic_gpu.counting import count_levels
from pallas_kernels.matvec.mosaic_gpu.geometry import Geometry
from pallas_kernels.matvec.mosaic_gpu.listing import RowList, compact, fetch, grade, list_first_plane, park
from pallas_kernels.matvec.mosaic_gpu.place import Refs, locate
from pallas_kernels.matvec.mosaic_gpu.reduction import combine, copy_scales, end_addresses, reduce
from pallas_kernels.matvec.mosaic_gpu.streaming import Copies, stream


def graded_matvec_program(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """One lane's whole work."""
    multiplies = isa.block_index() < geometry.matvec_blocks
    with isa.when(multiplies):
        matvec(isa, geometry, refs)
    with isa.when(~multiplies):
        count_levels(isa, geometry, refs)


def matvec(isa: Instructions, geometry: Geometry, refs: Refs) -> None:
    """What a lane of the CTAs that multiply does."""
    place = locate(isa, geometry, refs)
    operands = fetch(isa, geometry, refs, place)
    copy_scales(isa, geometry, refs, place)
    first = grade(isa, operands, 0)
    rows = RowList(isa, geometry, place, end=place.list)
    addresses = list_first_plane(isa, geometry, rows, first)
    copies = Copies.of(isa, geometry, refs, place)
    begun = copies.begin(rows.whole_steps())
    listed = compact(isa, geometry, operands, first, addresses, rows)
    copies.go_on(begun, listed.steps)
    park(isa, geometry, place, listed)
    ends = end_addresses(isa, geometry, place)
    accumulators = stream(isa, geometry, place, copies, listed.steps)
    for row in range(geometry.rows_per_cta):
        outputs = combine(isa, geometry, ends, accumulators, row)
        reduce(isa, geometry, refs, place, ends, outputs, row)
