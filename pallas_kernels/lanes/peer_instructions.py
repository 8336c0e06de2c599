"""The instructions of lane programs that address the memory of other devices."""

import abc
from typing import Any

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value


class PeerInstructions(Instructions):
    """The instructions of a program that runs on all devices of a mesh and addresses their memory."""

    @abc.abstractmethod
    def device_index(self) -> Value:
        """Returns the ``i32`` index of the device in the mesh."""

    @abc.abstractmethod
    def peer_address(self, ref: Any, device: int) -> list[Value]:
        """Returns the low and the high 32 bits of the address at which a device of the mesh has its array.

        All devices can use the address while they run the same program.
        """
