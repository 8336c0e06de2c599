"""GRINQH-JAX: decoding of large language models that reads each weight only as precisely as needed.

    generator = grinqh_jax.Generator.load(grinqh_jax.BUNDLED_MODEL)
    generation = generator.generate("Once upon a time", grinqh_jax.Request(bits=3.0))
    for text in generation:
        print(text, end="", flush=True)

``Generator`` is the way in; ``decoding.engine`` has the pure functions beneath it, ``checkpoint`` the format.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grinqh_jax.bundled import BUNDLED_MODEL
    from grinqh_jax.decoding.generator import Generation, Generator, Request
    from grinqh_jax.decoding.prompt_cache import PromptCache
    from grinqh_jax.errors import CheckpointError, GrinqhError, UnsupportedModelError, UsageError

__version__ = "0.1.0"

# Imported when first used: JAX takes a second, and --help or a mistyped flag should not wait for it.
_HOMES = {
    "BUNDLED_MODEL": "bundled",
    "CheckpointError": "errors",
    "Generation": "decoding.generator",
    "Generator": "decoding.generator",
    "GrinqhError": "errors",
    "PromptCache": "decoding.prompt_cache",
    "Request": "decoding.generator",
    "UnsupportedModelError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "BUNDLED_MODEL",
    "CheckpointError",
    "Generation",
    "Generator",
    "GrinqhError",
    "PromptCache",
    "Request",
    "UnsupportedModelError",
    "UsageError",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"grinqh_jax.{_HOMES[name]}"), name)
