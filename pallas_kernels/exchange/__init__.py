"""Sums over the devices of a mesh by one kernel that writes to the memory of all devices."""

from pallas_kernels.exchange.kernel import Mailbox, MailboxRef, UnexchangedSums, unsupported_reason

__all__ = ["Mailbox", "MailboxRef", "UnexchangedSums", "unsupported_reason"]
