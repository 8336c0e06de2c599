"""The instruction set that the kernels are written in: what one lane of a CUDA warp can do.

Pallas has no ballots, shuffles, gathers by lane, byte permutes or integer matrix instructions, so a
kernel is a *lane program*: Python code that calls the instructions below and describes what a single
lane does. Two back ends carry it out: ``ptx`` emits MLIR and PTX inside a Pallas Mosaic GPU kernel,
``emulator`` executes all lanes in lockstep on numpy arrays. This page is the specification of both.

A program is traced once: Python loops are unrolled, Python ``if`` is decided at trace time.
``when`` and ``loop`` are decided by the lane at run time. Instructions that involve a whole warp must
be reached by all 32 lanes.

Addresses are bytes: ``i64`` in global memory, ``i32`` in the CTA's shared memory, aligned to the size of
the access.
"""

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

LANES = 32
"""Lanes of a warp."""

Kind = Literal["i32", "i64", "f32", "bool"]
"""What a lane's register holds. ``i32`` serves signed and unsigned numbers and raw bits alike."""


class Value(abc.ABC):
    """One register of the lane. Python numbers become constants of the other operand's kind."""

    kind: Kind

    @abc.abstractmethod
    def binary(self, operation: str, other: "Value | int | float") -> "Value":
        """``self <operation> other``; ``operation`` is one of the names used below."""

    def __add__(self, other):
        return self.binary("add", other)

    __radd__ = __add__

    def __sub__(self, other):
        return self.binary("sub", other)

    def __mul__(self, other):
        return self.binary("mul", other)

    __rmul__ = __mul__

    def __and__(self, other):
        """Bitwise on integers, logical on ``bool``."""
        return self.binary("and", other)

    def __or__(self, other):
        return self.binary("or", other)

    def __xor__(self, other):
        return self.binary("xor", other)

    def __lshift__(self, other):
        return self.binary("shl", other)

    def __rshift__(self, other):
        """Logical shift: zeros come in."""
        return self.binary("shr", other)

    def __floordiv__(self, other):
        """Unsigned division, ``i32`` only."""
        return self.binary("div", other)

    def __mod__(self, other):
        """Unsigned remainder, ``i32`` only."""
        return self.binary("rem", other)

    def __lt__(self, other):
        """Signed on integers; on ``f32`` false if either side is NaN."""
        return self.binary("lt", other)

    def __ge__(self, other):
        """Signed on integers; on ``f32`` false if either side is NaN."""
        return self.binary("ge", other)

    def equals(self, other) -> "Value":
        """Integers only (``==`` stays Python's identity)."""
        return self.binary("eq", other)

    def __invert__(self):
        """Logical not, ``bool`` only."""
        return self.binary("xor", True)


class Instructions(abc.ABC):
    """The instructions. ``words`` are ``i32`` registers, vectors of registers are Python lists."""

    # --- constants, indices, addresses -----------------------------------------------------------
    @abc.abstractmethod
    def constant(self, value: int | float, kind: Kind = "i32") -> Value:
        """A constant; an ``i32`` may be given as signed or unsigned."""

    @abc.abstractmethod
    def thread_index(self) -> Value:
        """``i32``: which thread of the CTA; lane = index % 32, warp = index // 32.

        Asking again costs an instruction, but no register in between: what is computed from it anew is
        not kept.
        """

    @abc.abstractmethod
    def block_index(self) -> Value:
        """``i32``: which CTA of the (one-dimensional) grid. Asking again: as for ``thread_index``."""

    @abc.abstractmethod
    def global_address(self, ref: Any) -> Value:
        """``i64`` address of an array in global memory."""

    @abc.abstractmethod
    def shared_address(self, ref: Any) -> Value:
        """``i32`` address of the CTA's shared memory."""

    # --- registers -------------------------------------------------------------------------------
    @abc.abstractmethod
    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """``yes`` where ``condition`` holds, else ``no``."""

    @abc.abstractmethod
    def bits_to_float(self, word: Value) -> Value:
        """The same 32 bits as ``f32``."""

    @abc.abstractmethod
    def float_to_bits(self, number: Value) -> Value:
        """The same 32 bits as ``i32``."""

    @abc.abstractmethod
    def int_to_float(self, number: Value) -> Value:
        """Signed ``i32`` rounded to the nearest ``f32``."""

    @abc.abstractmethod
    def half_to_float(self, word: Value, which: Literal["low", "high"]) -> Value:
        """The float16 in the low or the high 16 bits of ``word``, exactly."""

    @abc.abstractmethod
    def widen(self, word: Value) -> Value:
        """``i32`` to ``i64`` as an unsigned number."""

    @abc.abstractmethod
    def absolute(self, number: Value) -> Value:
        """``|number|``; clears the sign of a NaN too."""

    @abc.abstractmethod
    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c`` in one instruction: ``f32``, rounded once, or ``i32``."""

    @abc.abstractmethod
    def divide(self, a: Value, b: Value) -> Value:
        """``a / b`` in ``f32`` within 2 ulp over the full range."""

    @abc.abstractmethod
    def reciprocal(self, x: Value) -> Value:
        """``1 / x`` in ``f32`` within 2 ulp; numbers below 1.2e-38 count as zero, in x and in the result."""

    @abc.abstractmethod
    def exp2(self, x: Value) -> Value:
        """``2**x`` in ``f32`` within 2 ulp; 0 far below zero."""

    @abc.abstractmethod
    def rsqrt(self, x: Value) -> Value:
        """``1 / sqrt(x)`` in ``f32`` within 2 ulp."""

    @abc.abstractmethod
    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        """Two ``f32`` rounded to the nearest bfloat16, ties to even, as the halves of an ``i32``."""

    @abc.abstractmethod
    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of two ``i32`` as unsigned. On the bits of non-negative floats it orders
        numbers < Inf < NaN, so that a NaN wins instead of being dropped."""

    @abc.abstractmethod
    def count_bits(self, word: Value) -> Value:
        """Ones in ``word``, 0 to 32."""

    @abc.abstractmethod
    def permute_bytes(self, low: Value, high: Value, selector: Value | int) -> Value:
        """Byte ``i`` of the result is byte ``selector >> 4 * i & 7`` of the eight bytes
        ``low[0..3], high[0..3]`` (PTX ``prmt``, selectors below 8)."""

    # --- memory ----------------------------------------------------------------------------------
    @abc.abstractmethod
    def load_global(
        self, address: Value, count: int = 1, kind: Kind = "i32", *, early: bool = False, once: bool = False
    ) -> list[Value]:
        """``count`` (1, 2 or 4) consecutive 32-bit words that nothing writes while the kernel runs.

        The compiler moves it to where it likes; with ``early`` not behind a later barrier, and not into a
        later ``when`` or ``loop``. With ``once`` nobody will want the words again: see ``copy_async``.
        """

    @abc.abstractmethod
    def load_global_16(self, address: Value) -> Value:
        """A 16-bit word (read-only as above), zero-extended to ``i32``."""

    @abc.abstractmethod
    def store_global(self, address: Value, values: Sequence[Value]) -> None:
        """1, 2 or 4 consecutive 32-bit words."""

    @abc.abstractmethod
    def load_shared(self, address: Value, count: int = 1, kind: Kind = "i32") -> list[Value]:
        """``count`` (1, 2 or 4) consecutive 32-bit words."""

    @abc.abstractmethod
    def store_shared(self, address: Value, values: Sequence[Value], where: Value | None = None) -> None:
        """1, 2 or 4 consecutive 32-bit words, in the lanes where ``where`` holds."""

    @abc.abstractmethod
    def copy_async(self, shared: Value, source: Value, *, once: bool = False) -> None:
        """Starts copying 16 bytes from global to shared memory (``cp.async.cg``: past the L1).

        With ``once`` nobody will want them again: they are the first to leave the L2 when it needs room.
        """

    @abc.abstractmethod
    def commit_copies(self) -> None:
        """Closes a group: the copies that this lane started since the last ``commit_copies``."""

    @abc.abstractmethod
    def wait_copies(self, pending: int) -> None:
        """Waits until at most the ``pending`` latest groups of this lane are unfinished. Other lanes
        see the data after a barrier."""

    # --- warp and CTA ----------------------------------------------------------------------------
    @abc.abstractmethod
    def block_barrier(self) -> None:
        """Waits for all threads of the CTA and orders their shared-memory accesses."""

    @abc.abstractmethod
    def warp_barrier(self) -> None:
        """Waits for all lanes of the warp and orders their shared-memory accesses."""

    @abc.abstractmethod
    def shuffle_xor(self, value: Value, mask: int) -> Value:
        """The register of lane ``lane ^ mask``."""

    @abc.abstractmethod
    def ballot(self, condition: Value) -> Value:
        """A word of which bit ``i`` says whether ``condition`` holds in lane ``i``."""

    @abc.abstractmethod
    def lower_lanes(self) -> Value:
        """A word with the bits of all lanes below this one."""

    @abc.abstractmethod
    def reduce_max(self, value: Value) -> Value:
        """``maximum`` over the 32 lanes."""

    @abc.abstractmethod
    def reduce_add(self, value: Value) -> Value:
        """Sum of an ``i32`` over the 32 lanes."""

    @abc.abstractmethod
    def matrix_multiply_add(self, c: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
        """``C + A @ B`` on the matrix unit (``mma.sync.m16n8k32``, unsigned A, signed B, int32 C).

        With ``row = lane // 4`` and ``column = lane % 4`` the lane holds four bytes a register:
        ``a[0..3]`` are ``A[row + 8 i, 4 column + 16 j ..+3]`` for ``(i, j) = (0,0) (1,0) (0,1) (1,1)``,
        ``b[0..1]`` are ``B[4 column + 16 j ..+3, row]``, and ``c[0..3]`` are
        ``C[row + 8 i, 2 column + j]`` for ``(i, j) = (0,0) (0,1) (1,0) (1,1)``.
        """

    @abc.abstractmethod
    def matrix_multiply_add_bfloat16(
        self, c: Sequence[Value], a: Sequence[Value], b: Sequence[Value]
    ) -> list[Value]:
        """``C + A @ B`` on the matrix unit (``mma.sync.m16n8k16``, bfloat16 A and B, ``f32`` C).

        With row and column as in ``matrix_multiply_add`` and two bfloat16 to a register, ``a[0..3]`` are
        ``A[row + 8 i, 2 column + 8 j ..+1]``, ``b[0..1]`` are ``B[2 column + 8 j ..+1, row]``; C as there.
        """

    # --- control ---------------------------------------------------------------------------------
    @abc.abstractmethod
    def when(self, condition: Value) -> AbstractContextManager[None]:
        """``with isa.when(condition):`` runs the body in the lanes where ``condition`` holds. The body
        hands no registers out."""

    @abc.abstractmethod
    def loop(
        self, count: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], list[Value]]
    ) -> list[Value]:
        """``for i in range(count): carry = body(i, carry)``; ``count`` is the same in a whole warp."""
