"""The instruction set of the kernels: the operations of one lane of a CUDA warp.

Pallas has no ballots, shuffles, gathers by lane, byte permutes or integer matrix instructions. A kernel is
therefore a *lane program*: a Python function that calls the instructions below and describes the work of a
single lane. Two back ends execute it. ``ptx`` emits MLIR and PTX inside a Pallas Mosaic GPU kernel;
``emulator`` runs all lanes in lockstep on NumPy arrays. This file, ``registers``, ``box_instructions`` and
``warpgroup_instructions`` specify it.

A program is traced once. Tracing unrolls Python loops and evaluates Python ``if`` statements; each lane
evaluates ``when`` and ``loop`` at run time. All 32 lanes must reach an instruction that involves the whole
warp.

Addresses count bytes and are multiples of the size of the access. They are ``i64`` in global memory and
``i32`` in the shared memory of the CTA.
"""

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from pallas_kernels.lanes.box_instructions import BoxInstructions
from pallas_kernels.lanes.registers import Kind, Value
from pallas_kernels.lanes.warpgroup_instructions import WarpgroupInstructions

LANES = 32
"""Number of lanes in a warp."""


class Instructions(WarpgroupInstructions, BoxInstructions):
    """The instructions. A word is an ``i32`` register; a vector of registers is a Python list."""

    # --- constants, indices, addresses -----------------------------------------------------------
    @abc.abstractmethod
    def constant(self, value: int | float, kind: Kind = "i32") -> Value:
        """Returns a constant. An ``i32`` may be written as a signed or an unsigned number."""

    @abc.abstractmethod
    def thread_index(self) -> Value:
        """Returns the ``i32`` index of the thread in its CTA; lane = index % 32, warp = index // 32.

        Every call emits an instruction. Another call costs less than a register that holds the index, or
        numbers derived from it, between two uses.
        """

    @abc.abstractmethod
    def block_index(self) -> Value:
        """Returns the ``i32`` index of the CTA in the one-dimensional grid; see ``thread_index``."""

    @abc.abstractmethod
    def global_address(self, ref: Any) -> Value:
        """Returns the ``i64`` address of an array in global memory."""

    @abc.abstractmethod
    def shared_address(self, ref: Any) -> Value:
        """Returns the ``i32`` address of the CTA's shared memory."""

    # --- registers -------------------------------------------------------------------------------
    @abc.abstractmethod
    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Returns ``yes`` if ``condition`` holds, else ``no``."""

    @abc.abstractmethod
    def bits_to_float(self, word: Value) -> Value:
        """Reinterprets 32 bits as ``f32``."""

    @abc.abstractmethod
    def float_to_bits(self, number: Value) -> Value:
        """Reinterprets 32 bits as ``i32``."""

    @abc.abstractmethod
    def int_to_float(self, number: Value) -> Value:
        """Rounds a signed ``i32`` to the nearest ``f32``."""

    @abc.abstractmethod
    def half_to_float(self, word: Value, half: Literal["low", "high"]) -> Value:
        """Converts the float16 in the low or the high 16 bits of ``word`` exactly."""

    @abc.abstractmethod
    def widen(self, word: Value) -> Value:
        """Extends an ``i32`` to ``i64`` as an unsigned number."""

    @abc.abstractmethod
    def absolute(self, number: Value) -> Value:
        """Returns ``|number|``; also clears the sign of a NaN."""

    @abc.abstractmethod
    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Returns ``a * b + c`` for ``i32``, or for ``f32`` with a single rounding."""

    @abc.abstractmethod
    def divide(self, a: Value, b: Value) -> Value:
        """Returns ``a / b`` in ``f32`` within 2 ulp over the full range."""

    @abc.abstractmethod
    def reciprocal(self, x: Value) -> Value:
        """Returns ``1 / x`` in ``f32`` within 2 ulp; magnitudes of x or the result below 1.2e-38 become 0."""

    @abc.abstractmethod
    def exp2(self, x: Value) -> Value:
        """Returns ``2**x`` in ``f32`` within 2 ulp; 0 if x is below -150."""

    @abc.abstractmethod
    def rsqrt(self, x: Value) -> Value:
        """Returns ``1 / sqrt(x)`` in ``f32`` within 2 ulp."""

    @abc.abstractmethod
    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        """Rounds two ``f32`` to the nearest bfloat16, ties to even, and packs them into an ``i32``."""

    @abc.abstractmethod
    def multiply_add_bfloat16(self, a: Value, b: Value, c: Value) -> Value:
        """Returns ``a * b + c`` of two pairs of bfloat16 in ``i32``, each with a single rounding."""

    @abc.abstractmethod
    def maximum(self, a: Value, b: Value) -> Value:
        """Returns the larger of two ``i32`` as unsigned numbers.

        On the bits of non-negative floats the order is numbers < Inf < NaN, so a NaN is never dropped.
        """

    @abc.abstractmethod
    def count_bits(self, word: Value) -> Value:
        """Counts the ones in ``word``."""

    @abc.abstractmethod
    def permute_bytes(self, low: Value, high: Value, selector: Value | int) -> Value:
        """Selects four of the eight bytes ``low[0..3], high[0..3]`` (PTX ``prmt``).

        Byte ``i`` of the result is byte ``selector >> 4 * i & 7``; no digit of the selector may exceed 7.
        """

    @abc.abstractmethod
    def select_bits(self, mask: int, yes: Value, no: Value) -> Value:
        """Returns the bits of ``yes`` where ``mask`` has a bit, else those of ``no`` (PTX ``lop3``).

        Written with ``&`` and ``|``, some compilers make two instructions of it.
        """

    # --- memory ----------------------------------------------------------------------------------
    @abc.abstractmethod
    def load_global(
        self,
        address: Value,
        count: int = 1,
        kind: Kind = "i32",
        *,
        ordered: bool = False,
        evict_first: bool = False,
    ) -> list[Value]:
        """Loads 1, 2 or 4 consecutive 32-bit words that nothing writes while the kernel runs.

        Args:
          address: Global address of the first word.
          count: Number of words.
          kind: ``i32`` or ``f32``.
          ordered: Whether the load stays in front of later barriers, ``when`` and ``loop``. Otherwise the
            compiler may move it.
          evict_first: See ``copy_async``.
        """

    @abc.abstractmethod
    def load_global_16(self, address: Value) -> Value:
        """Loads 16 bits that nothing writes while the kernel runs, zero-extended to ``i32``."""

    @abc.abstractmethod
    def store_global(self, address: Value, values: Sequence[Value]) -> None:
        """Stores 1, 2 or 4 consecutive 32-bit words."""

    @abc.abstractmethod
    def load_shared(self, address: Value, count: int = 1, kind: Kind = "i32") -> list[Value]:
        """Loads 1, 2 or 4 consecutive 32-bit words."""

    @abc.abstractmethod
    def store_shared(self, address: Value, values: Sequence[Value], where: Value | None = None) -> None:
        """Stores 1, 2 or 4 consecutive 32-bit words if ``where`` holds."""

    @abc.abstractmethod
    def or_shared(self, address: Value, value: Value, where: Value | None = None) -> None:
        """Sets the bits of ``value`` in a word if ``where`` holds. Lanes may change the same word."""

    @abc.abstractmethod
    def store_cluster(self, address: Value, rank: int, values: Sequence[Value]) -> None:
        """Stores 1, 2 or 4 consecutive 32-bit words in the shared memory of another CTA of the cluster.

        Needs compute capability 9.0. A ``cluster_barrier`` must follow, because a CTA that has ended has no
        shared memory.

        Args:
          address: Address that the first word has in the shared memory of that CTA.
          rank: Index of the CTA in its cluster.
          values: The words.
        """

    @abc.abstractmethod
    def load_matrices_transposed(self, address: Value, *, unwritten: bool = False) -> list[Value]:
        """Loads four 8 x 8 matrices of 16-bit elements, transposed (PTX ``ldmatrix.x4.trans``).

        The address of lane ``8 m + r`` is that of the 16 bytes of row ``r`` of matrix ``m``, a multiple of
        16. Register ``m`` of lane ``4 row + column`` receives the elements ``[2 column, row]`` (low half) and
        ``[2 column + 1, row]`` (high half) of matrix ``m``.

        With ``unwritten`` a row may be memory that nothing has written. It holds any numbers.
        """

    @abc.abstractmethod
    def copy_async(
        self, shared: Value, source: Value, *, evict_first: bool = False, where: Value | None = None
    ) -> None:
        """Starts copying 16 bytes from global to shared memory if ``where`` holds.

        The copy (``cp.async.cg``) bypasses the L1. ``evict_first`` marks bytes that are read only once: the
        L2 evicts them before others.
        """

    @abc.abstractmethod
    def commit_copies(self) -> None:
        """Closes a copy group: the copies that this lane started since the last ``commit_copies``."""

    @abc.abstractmethod
    def wait_copies(self, pending: int) -> None:
        """Waits until at most the ``pending`` latest copy groups of this lane are unfinished.

        Other lanes see the data after a barrier.
        """

    @abc.abstractmethod
    def store_flagged(self, address: Value, numbers: Sequence[Value], flag: Value) -> None:
        """Stores two ``f32`` in global memory, each in one access with ``flag``, an ``i32``, after it.

        The four words start at a multiple of 16 bytes. The memory may be that of another device.
        """

    @abc.abstractmethod
    def wait_flagged(self, address: Value, flag: Value) -> list[Value]:
        """Waits until a lane, of any device, has stored with ``flag`` at an address; returns the two ``f32``.

        No barrier is necessary (see ``store_flagged``).
        """

    @abc.abstractmethod
    def trap_unless(self, condition: Value) -> None:
        """Ends the program with an error unless ``condition`` holds."""

    # --- warp and CTA ----------------------------------------------------------------------------
    @abc.abstractmethod
    def block_barrier(self) -> None:
        """Waits for all threads of the CTA and orders their accesses to shared memory."""

    @abc.abstractmethod
    def cluster_barrier(self) -> None:
        """Waits for all threads of the cluster and orders their accesses to each other's shared memory."""

    @abc.abstractmethod
    def warp_barrier(self) -> None:
        """Waits for all lanes of the warp and orders their accesses to shared memory."""

    @abc.abstractmethod
    def shuffle_xor(self, value: Value, mask: int) -> Value:
        """Returns the register of lane ``lane ^ mask``."""

    @abc.abstractmethod
    def ballot(self, condition: Value) -> Value:
        """Returns a word whose bit ``i`` is set if ``condition`` holds in lane ``i``."""

    @abc.abstractmethod
    def lower_lanes(self) -> Value:
        """Returns a word with a bit set for every lane below this one."""

    @abc.abstractmethod
    def reduce_max(self, value: Value) -> Value:
        """Returns the ``maximum`` over the 32 lanes."""

    @abc.abstractmethod
    def reduce_add(self, value: Value) -> Value:
        """Returns the sum of an ``i32`` over the 32 lanes."""

    @abc.abstractmethod
    def matrix_multiply_add(self, c: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
        """Returns ``C + A @ B`` on the matrix unit (``mma.sync.m16n8k32``; A uint8, B int8, C int32).

        Let ``row = lane // 4`` and ``column = lane % 4``. A register of A or B holds four bytes. The lane
        holds ``A[row + 8 i, 4 column + 16 j ..+3]`` in ``a[0..3]`` for ``(i, j) = (0,0) (1,0) (0,1) (1,1)``,
        ``B[4 column + 16 j ..+3, row]`` in ``b[0..1]`` for ``j = 0, 1``, and ``C[row + 8 i, 2 column + j]``
        in ``c[0..3]`` for ``(i, j) = (0,0) (0,1) (1,0) (1,1)``.
        """

    @abc.abstractmethod
    def matrix_multiply_add_bfloat16(
        self, c: Sequence[Value], a: Sequence[Value], b: Sequence[Value]
    ) -> list[Value]:
        """Returns ``C + A @ B`` on the matrix unit (``mma.sync.m16n8k16``; A and B bfloat16, C ``f32``).

        A register of A or B holds two bfloat16. With the indices of ``matrix_multiply_add``, the lane holds
        ``A[row + 8 i, 2 column + 8 j ..+1]`` in ``a[0..3]``, ``B[2 column + 8 j ..+1, row]`` in ``b[0..1]``,
        and the same elements of C.
        """

    # --- control ---------------------------------------------------------------------------------
    @abc.abstractmethod
    def when(self, condition: Value) -> AbstractContextManager[None]:
        """Runs the body of ``with isa.when(condition):`` in the lanes where ``condition`` holds.

        Registers that the body creates must not be used after it.
        """

    @abc.abstractmethod
    def loop(
        self, count: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], list[Value]]
    ) -> list[Value]:
        """Runs ``for i in range(count): carry = body(i, carry)``; all lanes of a warp have the same count."""
