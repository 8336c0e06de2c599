"""The checkpoint that ships with the package."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "qwen3-7m"
"""Directory of a 7-million-parameter Qwen3, the default model of the command line."""
