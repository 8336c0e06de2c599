"""Reads GGUF files, the format of llama.cpp, as source checkpoints."""

from checkpoints_tools.source.gguf_file.checkpoint import GGUFCheckpoint, open_gguf

__all__ = ["GGUFCheckpoint", "open_gguf"]
