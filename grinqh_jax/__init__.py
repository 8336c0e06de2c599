"""GRINQH-JAX: language model decoding that reads each weight only as precisely as its input deserves.

    generator = grinqh_jax.Generator.load(grinqh_jax.BUNDLED_MODEL)
    generation = generator.generate("Once upon a time", grinqh_jax.Request(bits=3.0))
    for text in generation:
        print(text, end="", flush=True)

Start with ``Generator``. Its pure functions are in ``decoding.engine``, the checkpoint format is in
``checkpoint``. ``docs/stability.md`` lists the public names.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grinqh_jax.bundled import BUNDLED_MODEL
    from grinqh_jax.decoding.generation import Generation
    from grinqh_jax.decoding.generator import Generator
    from grinqh_jax.decoding.prompt_cache import PromptCache
    from grinqh_jax.decoding.request import Request
    from grinqh_jax.errors import CheckpointError, GrinqhError, UnsupportedModelError, UsageError

__version__ = "0.1.0"  # pyproject.toml reads it from here; .ci/release sets it

# Names are imported on first use: JAX takes a second to import, and --help should not wait for it.
_MODULES = {
    "BUNDLED_MODEL": "bundled",
    "CheckpointError": "errors",
    "Generation": "decoding.generation",
    "Generator": "decoding.generator",
    "GrinqhError": "errors",
    "PromptCache": "decoding.prompt_cache",
    "Request": "decoding.request",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"grinqh_jax.{_MODULES[name]}"), name)
