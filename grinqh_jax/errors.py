"""The errors that a user can cause. Each message is one line: the value, the place, the remedy.

The command line prints ``error: <message>`` and exits with 2 for these; any other exception is a bug.
"""


class GrinqhError(Exception):
    """Base of all errors raised on purpose by this library."""


class UsageError(GrinqhError):
    """An argument or an input is out of its range or cannot be used as asked."""


class UnsupportedModelError(GrinqhError):
    """A model's configuration names an architecture or options that are not implemented."""


class CheckpointError(GrinqhError):
    """A checkpoint is incomplete, damaged, or does not fit its own description."""
