"""Sums over the devices of a mesh axis as one kernel on NVIDIA GPUs that access each other's memory."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import decode_rows
from pallas_kernels.activations import Activations
from pallas_kernels.decode_rows.kernel import add_norm_outputs, by_row, rows_of, unapplied_norm
from pallas_kernels.decode_rows.program import AddNormRefs, Shape
from pallas_kernels.exchange import peers
from pallas_kernels.exchange.program import (
    MOST_DEVICES,
    ExchangeRefs,
    Layout,
    exchange_add_norm_program,
    exchange_program,
    open_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import WARPGROUP, lane_kernel
from pallas_kernels.lanes.rows import Rows


def unsupported_reason(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str | None:
    """Returns why the kernel cannot add up over the devices of a mesh, or None if it can.

    An abstract mesh has the device of the current abstract mesh, or JAX's default device.
    """
    if mesh.size > MOST_DEVICES:
        return f"adds up over at most {MOST_DEVICES} devices, not {mesh.size}"
    if jax.process_count() > 1:
        return f"needs all devices in one process, there are {jax.process_count()} processes"
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return device.unsupported_reason()
    devices = list(mesh.devices.flat)
    with jax.default_device(devices[0]):
        if (reason := device.unsupported_reason()) is not None:
            return reason
    pair = peers.without_access([each.local_hardware_id for each in devices])
    if pair is not None:
        return (
            f"needs GPUs that access each other's memory, and GPU {pair[0]} cannot access that of {pair[1]}"
        )
    return None


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
        partials, shape = by_row(sums, sums.features)
        (total,) = _exchange_kernel(self._layout, shape)(partials, self._words)
        return dataclasses.replace(sums, partials=total.reshape(1, *sums.leading, -1), terms=1)

    def add_norm(
        self, x: BFloat16[Array, "b t n"], sums: Activations, norm_scale: Float[Array, "n"], eps: float
    ) -> tuple[BFloat16[Array, "b t n"], Activations]:
        """Returns ``decode_rows.add_norm(x, self.summed(sums), norm_scale, eps)``, in one launch.

        ``decode_rows.supports(sums)`` must be None.
        """
        partials, shape = by_row(sums, sums.features)
        kernel = _exchange_add_norm_kernel(self._layout, shape)
        outputs = kernel(rows_of(x), partials, norm_scale.astype(jnp.bfloat16), self._words)
        return unapplied_norm(outputs, x.shape, eps)

    def frozen(self) -> Mailbox:
        """Returns the mailbox after all exchanges. The reference must not be used any more."""
        return Mailbox(jax.freeze(self._words), self._layout)


@dataclasses.dataclass(frozen=True)
class UnexchangedSums:
    """Partial sums of this device, of which the sum over all devices is left to the kernel that reads it.

    Every use exchanges them again, so there must be one, the same on all devices.

    Attributes:
      sums: The partial sums.
      mailbox: Mailbox that holds them.
    """

    sums: Activations
    mailbox: MailboxRef

    def exchanged(self) -> Activations:
        """Returns the sum over all devices."""
        return self.mailbox.summed(self.sums)

    @property
    def array(self) -> Float[Array, "*leading features"]:
        """The sum over all devices, in the dtype of the sums."""
        return self.exchanged().array

    def add_norm(
        self, x: Float[Array, "b t n"], norm_scale: Float[Array, "n"], eps: float
    ) -> tuple[Float[Array, "b t n"], Activations] | None:
        """Returns ``(x + sum, rms_norm(x + sum))`` as ``MailboxRef.add_norm`` does; None if it cannot run."""
        if decode_rows.supports(self.sums) is not None:
            return None
        return self.mailbox.add_norm(x, self.sums, norm_scale, eps)


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


@functools.cache
def _exchange_add_norm_kernel(layout: Layout, shape: Shape):
    """Builds the kernel. ``AddNormRefs`` describes its arguments and results; the mailbox is the last one."""

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        x, partials, norm_scale, mailbox, total, values, squares, shared = refs
        arrays = AddNormRefs(x, partials, norm_scale, total, values, squares, shared)
        exchange_add_norm_program(isa, layout, shape, arrays, mailbox)

    return lane_kernel(
        "exchange_add_norm_kernel",
        program,
        outputs=add_norm_outputs(shape.rows),
        blocks=shape.rows.blocks,
        threads=shape.rows.threads,
        shared_bytes=shape.rows.shared_bytes,
    )
