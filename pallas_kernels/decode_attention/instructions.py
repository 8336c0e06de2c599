"""What the attention kernel needs beyond the lane instructions of the graded matvec, for both back ends."""

import abc

import numpy as np

from pallas_kernels.matvec.mosaic_gpu.emulator import LaneValue, NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu.instructions import Instructions, Value


class AttentionInstructions(Instructions):
    """The additional instructions."""

    @abc.abstractmethod
    def exp2(self, x: Value) -> Value:
        """``2**x`` in ``f32`` within 2 ulp; 0 far below zero."""

    @abc.abstractmethod
    def rsqrt(self, x: Value) -> Value:
        """``1 / sqrt(x)`` in ``f32`` within 2 ulp."""

    @abc.abstractmethod
    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        """Two ``f32`` rounded to the nearest bfloat16, ties to even, as the halves of an ``i32``."""


class NumpyAttentionInstructions(NumpyInstructions, AttentionInstructions):
    """The emulator's."""

    def exp2(self, x):
        with np.errstate(all="ignore"):
            return LaneValue(np.exp2(x.data), "f32")

    def rsqrt(self, x):
        with np.errstate(all="ignore"):
            return LaneValue(1 / np.sqrt(x.data), "f32")

    def pack_bfloat16(self, low, high):
        def rounded(number):
            bits = number.data.view(np.uint32).astype(np.uint64)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)

        return LaneValue((rounded(low) | (rounded(high) << 16)).view(np.int32), "i32")


def ptx_instructions() -> AttentionInstructions:
    """Those of a GPU. Made on demand: the module behind them needs a recent JAX (see ``kernel``)."""
    from pallas_kernels.matvec.mosaic_gpu import ptx

    class PtxAttentionInstructions(ptx.PtxInstructions, AttentionInstructions):
        def exp2(self, x):
            return ptx._assemble("ex2.approx.ftz.f32 $0, $1;", [x], ("f32",))[0]

        def rsqrt(self, x):
            return ptx._assemble("rsqrt.approx.f32 $0, $1;", [x], ("f32",))[0]

        def pack_bfloat16(self, low, high):
            return ptx._assemble("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], ("i32",))[0]

    return PtxAttentionInstructions()
