"""Decode attention: the new tokens of each sequence attend to its key-value cache."""

from pallas_kernels.decode_attention.kernel import decode_attention, supports

__all__ = ["decode_attention", "supports"]
