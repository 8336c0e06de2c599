"""GRINQH-JAX: decoding of large language models that reads each weight only as precisely as needed."""

__version__ = "0.1.0"
