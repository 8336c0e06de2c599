"""Errors that a user can cause. Each message is one line that names the value, the place and the remedy.

The command line prints ``error: <message>`` for these errors and exits with code 2. Any other exception is a
bug.
"""


class GrinqhError(Exception):
    """Base class of the errors that this library raises on purpose."""


class UsageError(GrinqhError):
    """An argument or an input is out of range or does not fit the request."""


class UnsupportedModelError(GrinqhError):
    """A model's configuration names an architecture or an option that is not implemented."""


class CheckpointError(GrinqhError):
    """A checkpoint is incomplete, damaged, or contradicts its own description."""


class GrinqhWarning(UserWarning):
    """A model's files contradict each other or ask for something that is ignored.

    The command line prints these warnings as one line each.
    """
