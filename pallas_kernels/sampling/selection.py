"""The second launch of sampling: finds the tokens that the filters keep, and the best of them.

A CTA has a row. Keys are scaled logits as integers in the order of the numbers. All filters keep the keys
that reach a cutoff. With a top-k of usual size few tokens can be kept, and ``ranking`` ranks them; otherwise
``rejection`` takes the tokens in the order of their scores until the filters keep one.
"""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.sampling.block import THREADS, Block, Layout, Refs
from pallas_kernels.sampling.candidates import Shape
from pallas_kernels.sampling.ranking import choose_by_rank
from pallas_kernels.sampling.rejection import choose_by_rejection

__all__ = ["THREADS", "Refs", "selection_program", "shared_bytes"]


def shared_bytes(shape: Shape) -> int:
    """Returns the bytes of shared memory of a CTA."""
    return Layout.of(shape).size


def selection_program(isa: Instructions, shape: Shape, refs: Refs) -> None:
    """Runs the whole program of one lane."""
    block = Block(isa, shape, refs)
    token, found, bound = choose_by_rank(block)
    missing = isa.select(found, isa.constant(0), isa.constant(1))
    (token,) = isa.loop(missing, [token], lambda _, __: [choose_by_rejection(block, bound)])
    with isa.when(block.thread.equals(0)):
        isa.store_global(isa.global_address(refs.chosen) + isa.widen(block.row << 2), [token])
