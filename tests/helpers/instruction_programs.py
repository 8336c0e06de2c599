"""One small lane program for each instruction, for both back ends.

A program takes the instructions and its ``Operands`` and returns up to four 32-bit registers.
"""

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value

THREADS = 128
SHARED_BYTES = 4096
INPUT_WORDS = 8
OUTPUT_WORDS = 4


@dataclasses.dataclass(frozen=True)
class Operands:
    """The thread's two random integers ``a, b``, three normal floats ``x, y, z``, and its addresses."""

    thread: Value
    a: Value
    b: Value
    x: Value
    y: Value
    z: Value
    source: Value
    """Global address of the thread's 8 input words."""
    shared: Value
    """Shared address of the thread's 16 bytes."""
    all_shared: Value
    """Shared address of the first thread's 16 bytes."""
    target: Value
    """Global address of the thread's 4 output words."""
    array: Any
    """The ref of all input words."""


def inputs() -> np.ndarray:
    """Returns u32 ``[threads, 8]``: two random integers, three normal floats, three pairs of float16."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (THREADS, INPUT_WORDS), dtype=np.uint32)
    words[:, 2:5] = rng.standard_normal((THREADS, 3)).astype(np.float32).view(np.uint32)
    halves = rng.standard_normal((THREADS, 6)).astype(np.float16)
    words[:, 5:] = halves.view(np.uint32)
    return words


def as_word(isa: Instructions, value: Value) -> Value:
    """Converts a 32-bit register or a condition to ``i32``."""
    if value.kind == "f32":
        return isa.float_to_bits(value)
    if value.kind == "bool":
        return isa.select(value, isa.constant(1), isa.constant(0))
    return value


def small_bfloat16(isa: Instructions, word: Value) -> Value:
    """Returns two bfloat16 that are integers below 16, so that sums of their products are exact."""
    return isa.pack_bfloat16(isa.int_to_float(word & 15), isa.int_to_float((word >> 8) & 15))


def run(isa: Instructions, program, source: Any, target: Any, shared: Any) -> None:
    """Runs ``program`` as a whole lane program: loads its operands and stores its results."""
    thread = isa.thread_index()
    address = isa.global_address(source) + isa.widen(thread * (4 * INPUT_WORDS))
    a, b = isa.load_global(address, 2)
    x, y = isa.load_global(address + 8, 2, "f32")
    (z,) = isa.load_global(address + 16, 1, "f32")
    base = isa.shared_address(shared)
    results = isa.global_address(target) + isa.widen(thread << 4)
    operands = Operands(thread, a, b, x, y, z, address, base + (thread << 4), base, results, source)
    words = [as_word(isa, v) for v in program(isa, operands)]
    words += [isa.constant(0)] * (OUTPUT_WORDS - len(words))
    isa.store_global(results, words)


def emulated(program) -> np.ndarray:
    """Returns the results on the emulator, u32 ``[threads, 4]``."""
    isa = NumpyInstructions(blocks=1, threads=THREADS, shared_bytes=SHARED_BYTES)
    out = np.zeros((THREADS, OUTPUT_WORDS), np.uint32)
    run(isa, program, isa.array(inputs()), isa.array(out), None)
    isa.finish()
    return out


def copies(isa: Instructions, t: Operands) -> list[Value]:
    isa.copy_async(t.shared, t.source)
    isa.commit_copies()
    isa.copy_async(t.shared + 16 * THREADS, t.source + 16, evict_first=True)
    isa.commit_copies()
    isa.copy_async(t.shared, t.source + 16, where=t.thread < 0)
    isa.copy_async(t.shared, t.source + 16, evict_first=True, where=t.thread < 0)
    isa.wait_copies(1)
    isa.warp_barrier()
    first = isa.load_shared((t.shared - t.all_shared ^ 16) + t.all_shared, 2)
    isa.wait_copies(0)
    isa.block_barrier()
    return first + isa.load_shared((t.shared - t.all_shared ^ 1024) + t.all_shared + 16 * THREADS, 2)


def stores(isa: Instructions, t: Operands) -> list[Value]:
    isa.store_shared(t.shared, [t.a, t.b, t.x, t.y])
    isa.store_shared(t.shared, [t.b], where=t.a < t.b)
    with isa.when(t.a < 0):
        isa.store_shared(t.shared + 8, [t.z, t.z])
    isa.block_barrier()
    return isa.load_shared((t.shared - t.all_shared ^ 2032) + t.all_shared, 4)


def flagged_stores(isa: Instructions, t: Operands) -> list[Value]:
    isa.store_flagged(t.target, [t.x, t.y], t.a)
    isa.trap_unless((t.a & 1) < 2)
    return isa.wait_flagged(t.target, t.a)


def warpgroup(isa: Instructions, t: Operands) -> list[Value]:
    """Three products with two B, of 16 columns, which are queued."""
    isa.store_shared(t.shared, [t.a, t.b, t.a + t.b, t.a ^ t.b])
    isa.publish_operands()
    isa.block_barrier()
    sums = [[t.a & 0xFFFF, t.b, *[isa.constant(i) for i in range(6)]], [isa.constant(7)] * 8]
    for i in range(3):
        a = [t.a + i, t.b, t.a ^ t.b, t.b - t.a]
        sums = isa.queue_warpgroup_multiply_add(sums, [a, a[::-1]], t.all_shared, 512 * (i % 2))
    products = isa.finish_warpgroup_multiply_add(sums)
    return [x + y * 3 for x, y in zip(products[0][:4], products[1][4:], strict=True)]


def warpgroup_bfloat16(isa: Instructions, t: Operands) -> list[Value]:
    """16 columns of B are rows of 128 bytes. C starts with zeros and K from 16 to 47, then continues."""
    isa.store_shared(t.shared, [small_bfloat16(isa, t.b + i) for i in range(4)])
    isa.publish_operands()
    isa.block_barrier()
    a = [small_bfloat16(isa, word) for word in (t.a, t.b, t.a ^ t.b, t.b - t.a)]
    steps = [[a, a[::-1]], [a[::-1], a]]
    sums, _ = isa.warpgroup_multiply_add_bfloat16(16, None, steps, t.all_shared + 32)
    sums, others = isa.warpgroup_multiply_add_bfloat16(
        16, sums, steps[:1], t.all_shared + 96, lambda: [isa.int_to_float(t.a & 0xFF)]
    )
    return [x + y * 3.0 + others[0] for x, y in zip(sums[0][:4], sums[1][4:], strict=True)]


def boxes(isa: Instructions, t: Operands) -> list[Value]:
    """Two boxes in one phase, then another one in their place; the array has rows of 32 bytes."""
    barrier, first, zero = t.all_shared + 3072, t.thread.equals(0), isa.constant(0)
    with isa.when(first):
        isa.start_arrivals(barrier)
    isa.block_barrier()
    with isa.when(first):
        isa.expect_bytes(barrier, 3072)
        isa.copy_box(t.all_shared, t.array, [isa.constant(5), zero], (32, 16), barrier)
        corner = [isa.constant(THREADS - 4), isa.constant(4)]
        isa.copy_box(t.all_shared + 2048, t.array, corner, (8, 32), barrier, evict_first=True)
    isa.wait_arrival(barrier, zero)
    words = isa.load_shared(t.all_shared + (t.thread << 3), 2)
    words += isa.load_shared(t.all_shared + (t.thread << 2) + 2048)
    isa.block_barrier()
    with isa.when(first):
        isa.expect_bytes(barrier, 1024)
        isa.copy_box(t.all_shared + 1024, t.array, [zero, zero], (16, 16), barrier)
    isa.wait_arrival(barrier, isa.constant(1))
    return words + isa.load_shared(t.all_shared + (t.thread << 2) + 1024)


def bits_set(isa: Instructions, t: Operands) -> list[Value]:
    """Threads i and i + 64 set bits of one word."""
    isa.store_shared(t.shared, [t.a, t.b])
    isa.block_barrier()
    shared = t.all_shared + ((t.thread & 63) << 4)
    isa.or_shared(shared, t.b)
    isa.or_shared(shared + 4, t.a, where=t.a < t.b)
    isa.block_barrier()
    return isa.load_shared(t.shared, 2)


def cluster_stores(isa: Instructions, t: Operands) -> list[Value]:
    """The CTA is a cluster by itself, so its rank is 0."""
    isa.store_cluster(t.shared, 0, [t.a, t.b])
    isa.store_cluster((t.shared - t.all_shared ^ 8) + t.all_shared + 16 * THREADS, 0, [t.x])
    isa.cluster_barrier()
    first = isa.load_shared((t.shared - t.all_shared ^ 2032) + t.all_shared, 2)
    return first + isa.load_shared((t.shared - t.all_shared ^ 8) + t.all_shared + 16 * THREADS)


def transposed_loads(isa: Instructions, t: Operands) -> list[Value]:
    """Each warp loads 32 rows that other lanes stored, in another order."""
    isa.store_shared(t.shared, [t.a, t.b, t.a ^ t.b, t.a + t.b])
    isa.warp_barrier()
    return isa.load_matrices_transposed((t.shared - t.all_shared ^ 80) + t.all_shared)


def loops(isa: Instructions, t: Operands) -> list[Value]:
    def body(i: Value, carry: list[Value]) -> list[Value]:
        return [carry[0] + i, carry[1] * 0.5 + t.x]

    return isa.loop((t.thread >> 5) * 3, [t.a, t.y], body)


ONLY_9_0 = ("warpgroup", "warpgroup_bfloat16")
"""Programs that only compute capability 9.0 runs."""

NEED_9_0 = ("cluster", "boxes", *ONLY_9_0)
"""Programs that need compute capability 9.0 or later."""

PROGRAMS = {
    "constant": lambda isa, t: [isa.constant(0xFFFFFFFE), isa.constant(-2), isa.constant(1.5, "f32")],
    "indices": lambda isa, t: [t.thread, isa.block_index()],
    "add": lambda isa, t: [t.a + t.b, t.a + 7, t.x + t.y],
    "sub": lambda isa, t: [t.a - t.b, t.a - 7, t.x - t.y],
    "mul": lambda isa, t: [t.a * t.b, t.a * 7, t.x * t.y],
    "logic": lambda isa, t: [t.a & t.b, t.a | t.b, t.a ^ t.b, t.a & 0xC0C0C0C0],
    "shift": lambda isa, t: [t.a << 5, t.a >> 5, t.a << (t.b & 31), t.a >> (t.b & 31)],
    "divide integers": lambda isa, t: [t.a // 48, t.a % 48],
    "compare": lambda isa, t: [t.a < t.b, t.a >= t.b, t.x < t.y, (t.a & 3).equals(2)],
    "compare nan": lambda isa, t: [
        isa.constant(np.nan, "f32") < t.x,
        ~(isa.constant(np.nan, "f32") < t.x),
        isa.constant(np.nan, "f32") >= t.x,
        (t.a < 0) & (t.b < 0) | (t.x < 0.0),
    ],
    "select": lambda isa, t: [isa.select(t.a < t.b, t.a, t.b), isa.select(t.x < t.y, t.x, t.y)],
    "bits": lambda isa, t: [isa.bits_to_float(t.a ^ 1), isa.float_to_bits(t.x) + 1],
    "int_to_float": lambda isa, t: [isa.int_to_float(t.a), isa.int_to_float(t.a & 0xFF)],
    "half_to_float": lambda isa, t: [
        isa.half_to_float(isa.load_global(t.source + 20)[0], half) for half in ("low", "high")
    ],
    "widen": lambda isa, t: isa.load_global(
        isa.widen(t.a * 0 - 4) + t.source + isa.constant(8 - 2**32, "i64"), 1
    ),
    "absolute": lambda isa, t: [isa.absolute(t.x), isa.absolute(isa.bits_to_float(t.a | 0x80000000))],
    "multiply_add": lambda isa, t: [
        isa.multiply_add(t.x, t.y, t.z),
        isa.multiply_add(t.a, t.b, t.a),
        isa.multiply_add(t.b, isa.constant(256), t.a),
    ],
    "divide": lambda isa, t: [isa.divide(t.x, t.y), isa.divide(isa.constant(32512.0, "f32"), t.z)],
    "reciprocal": lambda isa, t: [isa.reciprocal(t.x), isa.reciprocal(t.y * 1e30), isa.reciprocal(t.z * 0.0)],
    "exp2": lambda isa, t: [isa.exp2(t.x), isa.exp2(t.y * 20.0), isa.exp2(isa.constant(-1e30, "f32"))],
    "rsqrt": lambda isa, t: [isa.rsqrt(isa.absolute(t.x)), isa.rsqrt(isa.absolute(t.y) * 1e20)],
    "pack_bfloat16": lambda isa, t: [isa.pack_bfloat16(t.x, t.y), isa.pack_bfloat16(t.z * 1e-39, t.z * 1e38)],
    "multiply_add_bfloat16": lambda isa, t: [
        isa.multiply_add_bfloat16(
            isa.pack_bfloat16(t.x, t.y), isa.pack_bfloat16(t.z, t.x), isa.pack_bfloat16(t.y, t.z * 100.0)
        )
    ],
    "maximum": lambda isa, t: [isa.maximum(t.a, t.b)],
    "count_bits": lambda isa, t: [isa.count_bits(t.a), isa.count_bits(t.b & 0xFF)],
    "select_bits": lambda isa, t: [isa.select_bits(0xCCCC0FF1, t.a, t.b)],
    "permute_bytes": lambda isa, t: [
        isa.permute_bytes(t.a, t.b, 0x5410),
        isa.permute_bytes(t.a, t.b, t.b & 0x7777),
    ],
    "load_global": lambda isa, t: isa.load_global(t.source + 16, 4),
    "evict-first load": lambda isa, t: isa.load_global(t.source + 16, 4, evict_first=True),
    "ordered evict-first load": lambda isa, t: isa.load_global(
        t.source + 8, 2, ordered=True, evict_first=True
    ),
    "ordered load": lambda isa, t: isa.load_global(t.source + 8, 2, "f32", ordered=True),
    "load_global_16": lambda isa, t: [isa.load_global_16(t.source + 22)],
    "shared memory": stores,
    "bits set": bits_set,
    "flagged stores": flagged_stores,
    "cluster": cluster_stores,
    "warpgroup": warpgroup,
    "warpgroup_bfloat16": warpgroup_bfloat16,
    "boxes": boxes,
    "transposed loads": transposed_loads,
    "asynchronous copies": copies,
    "shuffle_xor": lambda isa, t: [isa.shuffle_xor(t.a, 2), isa.shuffle_xor(t.x, 16)],
    "ballot": lambda isa, t: [isa.ballot(t.a < t.b), isa.lower_lanes()],
    "reductions": lambda isa, t: [isa.reduce_max(t.a), isa.reduce_add(t.a)],
    "matrix_multiply_add": lambda isa, t: isa.matrix_multiply_add(
        [t.a & 0xFFFF, t.b & 0xFFFF, t.a & 0xFF, t.b & 0xFF],
        [t.a, t.b, t.a ^ t.b, t.a + t.b],
        [t.a * 3, t.b * 5],
    ),
    "matrix_multiply_add_bfloat16": lambda isa, t: isa.matrix_multiply_add_bfloat16(
        [isa.int_to_float(t.a & 0xFF), t.z * 0.0, t.z * 0.0, isa.int_to_float(t.b & 0xFF)],
        [small_bfloat16(isa, word) for word in (t.a, t.b, t.a ^ t.b, t.a + t.b)],
        [small_bfloat16(isa, word) for word in (t.a * 3, t.b * 5)],
    ),
    "loop": loops,
}
"""Programs by name. Together they use every instruction."""
