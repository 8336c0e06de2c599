"""The errors of an engine and of its answers."""

from grinqh_jax.errors import GrinqhError


class EngineError(GrinqhError):
    """The engine has failed or was closed, or an answer has failed, and is incomplete."""


class AnswerError(EngineError):
    """One answer has failed. The engine and the other answers go on."""
