"""The kernels between two graded products of a decode step: residual and norm, and SwiGLU."""

from pallas_kernels.decode_rows.kernel import add_norm, supports, supports_rows, swiglu, swiglu_experts
from pallas_kernels.decode_rows.program import Clamp

__all__ = ["Clamp", "add_norm", "supports", "supports_rows", "swiglu", "swiglu_experts"]
