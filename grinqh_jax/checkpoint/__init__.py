"""The GRINQH checkpoint: its format, its writer, and a loader that trusts nothing."""

from grinqh_jax.checkpoint.quantization import QuantizationConfig
from grinqh_jax.checkpoint.reader import Loaded, load
from grinqh_jax.checkpoint.writer import Writer

__all__ = ["Loaded", "QuantizationConfig", "Writer", "load"]
