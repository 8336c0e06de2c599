"""Dequantization of whole weights, for the matrix products of prefill."""

from pallas_kernels.dequantization.kernel import dequantize_to_bfloat16, supports

__all__ = ["dequantize_to_bfloat16", "supports"]
