"""Operands of the matrix unit from transposed loads."""

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531
"""Selectors that gather the bytes of equal parity of two words."""


def gather_bytes(isa: Instructions, words: list[Value]) -> list[Value]:
    """Returns the registers of an operand A from the four words of ``load_matrices_transposed``.

    A word holds two neighbouring bytes of two channels, so two words give four channels of either byte. Row
    ``r`` of A is byte ``2 r`` of the 16, row ``r + 8`` byte ``2 r + 1``.
    """
    return [
        isa.permute_bytes(low, high, selector)
        for low, high in (words[:2], words[2:])
        for selector in (EVEN_BYTES, ODD_BYTES)
    ]
