"""The lane programs of a sum over devices: opening the mailboxes, an exchange, and an exchange with a norm.

Each device has a mailbox that all devices write to. In an exchange, a device adds up its partial sums, stores
the result in its slot of every mailbox, and adds up all slots of its own mailbox, in the order of the
devices. So all devices compute the same bits.

Two numbers and the number of the exchange are stored together (``Instructions.store_flagged``), so a lane
needs no barrier: it waits for the numbers that it adds. This is the idea of the LL protocol of NCCL. No
store can hit a slot that is still read. Exchange ``n`` uses the slots of parity ``n % 2``. A device begins
exchange ``n + 2`` after it has received the results of exchange ``n + 1`` of all others, and they have sent
these after their kernel of exchange ``n`` has ended.
"""

import dataclasses
from typing import Any

from pallas_kernels.decode_rows.program import AddNormRefs, Shape, store_sum_and_norm
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.peer_instructions import PeerInstructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import FeaturePair, Rows, locate, unpack_bfloat16

MOST_DEVICES = 8
"""Largest number of devices. The runtime of Mosaic GPU has the same limit (jax 0.11.2)."""

INDEX_WORD = 2 * MOST_DEVICES
COUNTERS_WORD = INDEX_WORD + 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """The words of a mailbox, 32 bits each.

    First come the addresses of the mailboxes of all devices, 64 bits each, at ``INDEX_WORD`` the index of
    this device, and at ``COUNTERS_WORD`` the number of exchanges that each CTA has completed. Then come two
    slots for each device, with two words for each number. A CTA always has the same features, whatever the
    number of rows, so its counter belongs to its part of the slots.

    Attributes:
      devices: Number of devices.
      rows: Largest number of rows of an exchange, and the number of their features.
    """

    devices: int
    rows: Rows

    @property
    def slots_byte(self) -> int:
        """Offset of the first slot."""
        return -(-4 * (COUNTERS_WORD + self.rows.blocks) // 16) * 16

    @property
    def slot_bytes(self) -> int:
        """Size of a slot. A lane's two numbers take 16 bytes."""
        return 16 * self.rows.rows * -(-self.rows.features // 2)

    @property
    def words(self) -> int:
        """Number of words."""
        return (self.slots_byte + 2 * self.devices * self.slot_bytes) // 4


def open_program(isa: PeerInstructions, layout: Layout, mailbox: Any) -> None:
    """Writes the addresses of all mailboxes, and the index of this device, into a mailbox of zeros."""
    with isa.when(isa.thread_index().equals(0)):
        base = isa.global_address(mailbox)
        for device in range(layout.devices):
            isa.store_global(base + 8 * device, isa.peer_address(mailbox, device))
        isa.store_global(base + 4 * INDEX_WORD, [isa.device_index()])


@dataclasses.dataclass(frozen=True)
class ExchangeRefs:
    """Arrays in global memory.

    Attributes:
      partials: float32 ``[partials, rows, terms stored_features]``: partial sums of this device.
      mailbox: int32 ``[words]``: the mailbox of this device (``Layout``).
      total: Output, float32 ``[rows, features]``: the sum over all devices.
    """

    partials: Any
    mailbox: Any
    total: Any


def exchange_program(isa: Instructions, layout: Layout, shape: Shape, refs: ExchangeRefs) -> None:
    """Adds up partial sums over the devices; the module's docstring says how."""
    rows = shape.rows
    pair = locate(isa, rows)
    total = _sum_over_devices(isa, layout, shape, pair, refs.partials, refs.mailbox)
    with isa.when(pair.exists):
        offset = isa.widen((pair.row * rows.features + pair.feature) << 2)
        isa.store_global(isa.global_address(refs.total) + offset, total)


def exchange_add_norm_program(
    isa: Instructions, layout: Layout, shape: Shape, refs: AddNormRefs, mailbox: Any
) -> None:
    """Runs ``exchange_program`` and ``decode_rows.program.add_norm_program`` in one launch, with their bits.

    Args:
      isa: The instructions.
      layout: Layout of the mailbox.
      shape: Sizes of the launch.
      refs: Arrays of ``add_norm_program``; the partial sums are those of this device.
      mailbox: Mailbox of this device.
    """
    rows = shape.rows
    pair = locate(isa, rows)
    # These loads are ordered, so that they do not follow the wait for the other devices.
    x, norm_scale = (
        unpack_bfloat16(isa, isa.load_global(isa.global_address(ref) + isa.widen(i << 1), ordered=True)[0])
        for ref, i in ((refs.x, pair.row * rows.features + pair.feature), (refs.norm_scale, pair.feature))
    )
    update = _sum_over_devices(isa, layout, shape, pair, refs.partials, mailbox)
    store_sum_and_norm(isa, rows, pair, refs, x, update, norm_scale)


def _sum_over_devices(
    isa: Instructions, layout: Layout, shape: Shape, pair: FeaturePair, partials: Any, mailbox: Any
) -> list[Value]:
    """Returns the sum over all devices of the lane's two features.

    A lane without features returns those of feature 0, which another lane exchanges.
    """
    rows = shape.rows
    assert rows.features == layout.rows.features, "a mailbox has rows of one width"
    assert rows.rows <= layout.rows.rows, "a mailbox has room for its rows"
    own = shape.sum(isa, partials, shape.index(pair.row, pair.feature))
    base = isa.global_address(mailbox)
    counter = base + 4 * COUNTERS_WORD + isa.widen(isa.block_index() << 2)
    # Ordered, because other kernels and devices write to the mailbox.
    number = isa.load_global(counter, ordered=True)[0] + 1
    index = isa.load_global(base + 4 * INDEX_WORD, ordered=True)[0]
    addresses = [_load_address(isa, base + 8 * device) for device in range(layout.devices)]
    place = (number & 1) * (layout.devices * layout.slot_bytes) + layout.slots_byte
    place = isa.widen(place + ((pair.row * rows.features + pair.feature) << 3))
    with isa.when(pair.exists):
        for address in addresses:
            isa.store_flagged(address + place + isa.widen(index * layout.slot_bytes), own, number)
    isa.block_barrier()  # All lanes have read the counter.
    with isa.when(pair.thread.equals(0)):
        isa.store_global(counter, [number])
    # The addresses are those of the mailboxes at the time of opening: XLA must not have moved this one.
    isa.trap_unless(_load_address(isa, base + isa.widen(index << 3)).equals(base))
    total = isa.wait_flagged(base + place, number)
    for device in range(1, layout.devices):
        numbers = isa.wait_flagged(base + place + device * layout.slot_bytes, number)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
    return total


def _load_address(isa: Instructions, place: Value) -> Value:
    low, high = (isa.widen(word) for word in isa.load_global(place, 2, ordered=True))
    return low + (high << 32)
