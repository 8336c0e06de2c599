"""The GRINQH checkpoint format: a writer, and a reader that verifies everything.

``docs/format.md`` describes the format completely.
"""

from grinqh_jax.checkpoint.quantization import QuantizationConfig
from grinqh_jax.checkpoint.reader import Loaded, load
from grinqh_jax.checkpoint.writer import Writer

__all__ = ["Loaded", "QuantizationConfig", "Writer", "load"]
