"""Sums over the devices of a mesh axis as one kernel on NVIDIA GPUs that access each other's memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.activations import Activations
from pallas_kernels.decode_rows.program import Shape
from pallas_kernels.exchange.program import (
    MOST_DEVICES,
    ExchangeRefs,
    Layout,
    exchange_program,
    open_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.launch import WARPGROUP, lane_kernel
from pallas_kernels.lanes.rows import Rows


def unsupported_reason(devices: int) -> str | None:
    """Returns why the kernel cannot add up over so many devices, or None if it can."""
    if devices > MOST_DEVICES:
        return f"adds up over at most {MOST_DEVICES} devices, not {devices}"
    if jax.process_count() > 1:
        return f"needs all devices in one process, there are {jax.process_count()}"
    return device.unsupported_reason()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mailbox:
    """The memory through which a program exchanges sums, inside ``shard_map``.

    A program opens its mailbox, updates it in each step of its loop, and discards it. All devices must make
    the same exchanges in the same order.

    Attributes:
      words: Contents (``Layout``) of the mailbox of this device. XLA must update them in place.
      layout: The layout.
    """

    words: Int[Array, "words"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    @classmethod
    def open(cls, devices: int, rows: int, features: int) -> "Mailbox":
        """Returns a mailbox for sums of up to ``rows`` rows; waits for all devices of the mesh."""
        layout = Layout(devices, Rows(rows, features))
        words = jax.new_ref(jnp.zeros(layout.words, jnp.int32))
        _open_kernel(layout)(words)
        return cls(jax.freeze(words), layout)

    def referenced(self) -> "MailboxRef":
        """Returns the mailbox as a reference, for the exchanges of one step."""
        return MailboxRef(jax.new_ref(self.words), self.layout)


class MailboxRef:
    """A mailbox that exchanges change in place."""

    def __init__(self, words: jax.Ref, layout: Layout):
        self._words, self._layout = words, layout

    def holds(self, sums: Activations) -> bool:
        """Whether partial sums can be added up through this mailbox."""
        rows = self._layout.rows
        fits = math.prod(sums.leading) <= rows.rows and sums.features == rows.features
        return fits and sums.partials.dtype == jnp.float32 and sums.square_partials is None

    def summed(self, sums: Activations) -> Activations:
        """Returns the sum over the devices, as ``Activations.summed_across`` does, in the devices' order."""
        leading = sums.leading
        partials = sums.reshape((-1,)).partials
        rows = Rows(partials.shape[1], sums.features)
        shape = Shape(rows, partials.shape[0], partials.shape[-1] // sums.terms, sums.terms)
        (total,) = _exchange_kernel(self._layout, shape)(partials, self._words)
        return dataclasses.replace(sums, partials=total.reshape(1, *leading, -1), terms=1)

    def frozen(self) -> Mailbox:
        """Returns the mailbox after all exchanges. The reference must not be used any more."""
        return Mailbox(jax.freeze(self._words), self._layout)


@functools.cache
def _open_kernel(layout: Layout):
    """Builds the kernel ``(mailbox,) -> ()``."""
    return lane_kernel(
        "open_mailbox_kernel",
        lambda isa, refs: open_program(isa, layout, refs[0]),
        outputs=[],
        blocks=1,
        threads=WARPGROUP,
        shared_bytes=4,
        peers=True,
    )


@functools.cache
def _exchange_kernel(layout: Layout, shape: Shape):
    """Builds the kernel. ``ExchangeRefs`` describes its arguments and results."""
    rows = shape.rows
    return lane_kernel(
        "exchange_kernel",
        lambda isa, refs: exchange_program(isa, layout, shape, ExchangeRefs(*refs[:3])),
        outputs=[jax.ShapeDtypeStruct((rows.rows, rows.features), jnp.float32)],
        blocks=rows.blocks,
        threads=rows.threads,
        shared_bytes=rows.shared_bytes,
    )
