"""Whole weights at full precision: what a prompt's matrix products read."""

from pallas_kernels.dequantization.kernel import dequantize_to_bfloat16, supports

__all__ = ["dequantize_to_bfloat16", "supports"]
