"""Attention of a decode step: one new token per sequence against its key-value cache."""

from pallas_kernels.decode_attention.kernel import decode_attention, supports

__all__ = ["decode_attention", "supports"]
