"""The part of the PTX back end that needs compute capability 9.0: products of warpgroups, copies of boxes."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.ptx_values import PtxValue, assemble, cache_policy, mlir_type, operands


def _matrices(registers: list[PtxValue], count: int) -> list[list[PtxValue]]:
    """Divides registers among ``count`` matrices of equal size."""
    each = len(registers) // count
    return [registers[each * i :][:each] for i in range(count)]


class HopperPtxInstructions(Instructions):
    """Products of warpgroups and copies of boxes.

    Attributes:
      context: The context of the Mosaic GPU kernel.
    """

    def __init__(self, context):
        self.context = context

    def queue_warpgroup_multiply_add(self, c, a, b, offset):
        descriptor = self._descriptor(b, 128, 256, offset)
        sums = self._start_products(f"m64n{2 * len(c[0])}k32.s32.u8.s8", "", c, [a], [descriptor])
        assemble("wgmma.wait_group.sync.aligned 1;", [], warp=True)
        return _matrices(sums, len(c))

    def finish_warpgroup_multiply_add(self, c):
        return _matrices(self._finish_products([register for sums in c for register in sums]), len(c))

    def warpgroup_multiply_add_bfloat16(self, columns, c, a, b, meanwhile=list):
        instruction = f"m64n{columns}k16.f32.bf16.bf16"
        descriptors = [self._descriptor(b + 32 * i, 16, 1024, swizzled=True) for i in range(len(a))]
        add = c is not None
        if c is None:
            c = [[self.undefined("f32") for _ in range(columns // 2)] for _ in a[0]]
        modifiers = ", 1, 1, 0"  # neither A nor B negated, B not transposed
        sums = self._start_products(instruction, modifiers, c, a, descriptors, add=add)
        # The results pass through the wait, so that their instructions stay before it.
        out = self._finish_products([*sums, *meanwhile()])
        return _matrices(out[: len(sums)], len(c)), out[len(sums) :]

    def undefined(self, kind):
        """Returns a register that nothing has written."""
        return PtxValue(llvm.mlir_undef(mlir_type(kind)), kind)

    def _descriptor(self, b, along_k, along_n, offset=0, swizzled=False):
        """Returns the descriptor of an operand B.

        Args:
          b, offset: Its address is their sum. The offset costs one instruction.
          along_k, along_n: Bytes between neighbouring blocks of 8 columns and 16 bytes of K, along K and N.
          swizzled: Whether rows of 128 bytes are as ``copy_box`` leaves them.
        """
        low = ((b & 0x3FFFF) >> 4) | (along_k >> 4) << 16  # in units of 16 bytes
        high = (along_n >> 4) | (1 << 30 if swizzled else 0)
        return self.widen(low + (offset >> 4) if offset else low) | high << 32

    def _start_products(self, instruction, modifiers, c, a, descriptors, add=True):
        """Starts ``wgmma`` for every B and every C as one group, and returns the registers of all C.

        Args:
          instruction: Shape and types.
          modifiers: Last operands of the instruction.
          c: Registers of each C.
          a: For each B, the registers of A for each C.
          descriptors: The descriptor of each B.
          add: Whether the products with the first B are added to C, or replace it.
        """
        width, count = len(c[0]), sum(map(len, c))
        registers = [register for matrices in a for matrix in matrices for register in matrix]
        template = "wgmma.fence.sync.aligned; "
        for step in range(len(a)):
            for i in range(len(c)):
                matrix = operands(4, 2 * count + 4 * (step * len(c) + i))
                template += (
                    f"wgmma.mma_async.sync.aligned.{instruction} {operands(width, width * i)}, {matrix}, "
                    f"${2 * count + len(registers) + step}, {int(add or step > 0)}{modifiers}; "
                )
        template += "wgmma.commit_group.sync.aligned;"
        inputs = [*(register for matrix in c for register in matrix), *registers, *descriptors]
        kinds = tuple(v.kind for v in inputs[:count])
        return assemble(template, inputs, kinds, warp=True, tied=count)

    def _finish_products(self, values):
        """Waits for all groups, and returns the values, which pass through the wait."""
        kinds = tuple(v.kind for v in values)
        return assemble("wgmma.wait_group.sync.aligned 0;", values, kinds, warp=True, tied=len(values))

    def start_arrivals(self, barrier):
        template = "mbarrier.init.shared::cta.b64 [$0], 1; fence.mbarrier_init.release.cluster;"
        assemble(f"{template} fence.proxy.async.shared::cta;", [barrier], effects=True)

    def expect_bytes(self, barrier, count):
        template = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count};"
        assemble(template, [barrier], effects=True)

    def copy_box(self, shared, ref, corner, box, barrier, *, evict_first=False):
        hint, policy, operand = cache_policy(evict_first, 3 + len(corner))
        first = ",".join(f"${3 + i}" for i in range(len(corner)))
        template = (
            f"cp.async.bulk.tensor.{len(box)}d.shared::cluster.global.mbarrier::complete_tx::bytes{hint} "
            f"[$0], [$1, {{{first}}}], [$2]{operand};"
        )
        inputs = [shared, self._tensor_map(ref, box), barrier, *corner[::-1], *policy]
        assemble(template, inputs, effects=True)

    def _tensor_map(self, ref, box):
        """Returns the address of the description of an array that copies of its boxes need."""
        row_bytes = box[-1] * ir.MemRefType(ref.type).element_type.width // 8
        # Positional, because jax 0.11.2 and 0.12 call the first arguments alike.
        pointer = self.context._get_tma_desc(ref, (), None, box, row_bytes, None)
        return PtxValue(pointer, "i64")

    def wait_arrival(self, barrier, parity):
        template = (
            "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }"
        )
        assemble(template, [barrier, parity], effects=True)

    def publish_operands(self):
        assemble("fence.proxy.async.shared::cta;", [], effects=True)
