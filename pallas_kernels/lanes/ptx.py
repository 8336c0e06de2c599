"""The back end that emits lane instructions as MLIR and PTX inside ``plgpu.inline_mgpu`` (jax >= 0.11.2).

Arithmetic and control flow use MLIR's arith and scf dialects, so that the compiler folds addresses and shares
subexpressions. All other instructions are inline PTX (PTX ISA 8.0; sm_80 and later, clusters sm_90).
"""

import contextlib

from jax.experimental.mosaic.gpu import utils as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.lanes.peer_instructions import PeerInstructions
from pallas_kernels.lanes.ptx_hopper import HopperPtxInstructions
from pallas_kernels.lanes.ptx_values import (
    PtxValue,
    assemble,
    cache_policy,
    constant,
    mlir_type,
    operands,
)

_VECTOR = {1: "", 2: ".v2", 4: ".v4"}
_ALL_LANES = "0xffffffff"


class PtxInstructions(HopperPtxInstructions):
    """Emits the lane program at MLIR's current insertion point. Refs are memrefs."""

    def constant(self, value, kind="i32"):
        return constant(value, kind)

    def thread_index(self):
        # The effects keep the compiler from merging two reads into one long-lived register.
        return assemble("mov.u32 $0, %tid.x;", [], ("i32",), effects=True)[0]

    def block_index(self):
        return assemble("mov.u32 $0, %ctaid.x;", [], ("i32",), effects=True)[0]

    def global_address(self, ref):
        return PtxValue(llvm.ptrtoint(mlir_type("i64"), mosaic.memref_ptr(ref)), "i64")

    def shared_address(self, ref):
        return PtxValue(llvm.ptrtoint(mlir_type("i32"), mosaic.memref_ptr(ref)), "i32")

    def select(self, condition, yes, no):
        return PtxValue(arith.select(condition.ssa, yes.ssa, no.ssa), yes.kind)

    def bits_to_float(self, word):
        return PtxValue(arith.bitcast(mlir_type("f32"), word.ssa), "f32")

    def float_to_bits(self, number):
        return PtxValue(arith.bitcast(mlir_type("i32"), number.ssa), "i32")

    def int_to_float(self, number):
        return PtxValue(arith.sitofp(mlir_type("f32"), number.ssa), "f32")

    def half_to_float(self, word, half):
        register = {"low": "lo", "high": "hi"}[half]
        template = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; cvt.f32.f16 $0, " + register + "; }"
        return assemble(template, [word], ("f32",))[0]

    def widen(self, word):
        return PtxValue(arith.extui(mlir_type("i64"), word.ssa), "i64")

    def absolute(self, number):
        return assemble("abs.f32 $0, $1;", [number], ("f32",))[0]

    def multiply_add(self, a, b, c):
        name = "fma.rn.f32" if a.kind == "f32" else "mad.lo.s32"
        return assemble(f"{name} $0, $1, $2, $3;", [a, b, c], (a.kind,))[0]

    def divide(self, a, b):
        return assemble("div.full.f32 $0, $1, $2;", [a, b], ("f32",))[0]

    def reciprocal(self, x):
        return assemble("rcp.approx.ftz.f32 $0, $1;", [x], ("f32",))[0]

    def exp2(self, x):
        return assemble("ex2.approx.ftz.f32 $0, $1;", [x], ("f32",))[0]

    def rsqrt(self, x):
        return assemble("rsqrt.approx.f32 $0, $1;", [x], ("f32",))[0]

    def pack_bfloat16(self, low, high):
        return assemble("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], ("i32",))[0]

    def multiply_add_bfloat16(self, a, b, c):
        return assemble("fma.rn.bf16x2 $0, $1, $2, $3;", [a, b, c], ("i32",))[0]

    def maximum(self, a, b):
        return PtxValue(arith.maxui(a.ssa, b.ssa), "i32")

    def count_bits(self, word):
        return assemble("popc.b32 $0, $1;", [word], ("i32",))[0]

    def permute_bytes(self, low, high, selector):
        selector = selector if isinstance(selector, PtxValue) else constant(selector, "i32")
        return assemble("prmt.b32 $0, $1, $2, $3;", [low, high, selector], ("i32",))[0]

    def select_bits(self, mask, yes, no):
        return assemble(f"lop3.b32 $0, $1, $2, {mask}, 0xe4;", [yes, no], ("i32",))[0]

    def load_global(self, address, count=1, kind="i32", *, ordered=False, evict_first=False):
        # ptxas (13.0 and 13.5) moves loads through the read-only path (nc) across barriers.
        path = "" if ordered else ".nc"
        hint, policy, operand = cache_policy(evict_first, count + 1)
        template = f"ld.global{path}{hint}{_VECTOR[count]}.b32 {operands(count, 0)}, [${count}]{operand};"
        return assemble(template, [address, *policy], (kind,) * count, effects=ordered)

    def load_global_16(self, address):
        template = "{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }"
        return assemble(template, [address], ("i32",))[0]

    def store_global(self, address, values):
        template = f"st.global{_VECTOR[len(values)]}.b32 [$0], {operands(len(values), 1)};"
        assemble(template, [address, *values], effects=True)

    def load_shared(self, address, count=1, kind="i32"):
        template = f"ld.shared{_VECTOR[count]}.b32 {operands(count, 0)}, [${count}];"
        return assemble(template, [address], (kind,) * count, effects=True)

    def store_shared(self, address, values, where=None):
        template = f"st.shared{_VECTOR[len(values)]}.b32 [$0], {operands(len(values), 1)};"
        if where is None:
            assemble(template, [address, *values], effects=True)
        else:
            assemble(f"@${len(values) + 1} {template}", [address, *values, where], effects=True)

    def or_shared(self, address, value, where=None):
        predicate, condition = ("", []) if where is None else ("@$2 ", [where])
        assemble(f"{predicate}red.shared.or.b32 [$0], $1;", [address, value, *condition], effects=True)

    def store_cluster(self, address, rank, values):
        (remote,) = assemble(f"mapa.shared::cluster.u32 $0, $1, {rank};", [address], ("i32",))
        template = f"st.shared::cluster{_VECTOR[len(values)]}.b32 [$0], {operands(len(values), 1)};"
        assemble(template, [remote, *values], effects=True)

    def load_matrices_transposed(self, address, *, unwritten=False):
        template = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];"
        return assemble(template, [address], ("i32",) * 4, warp=True)

    def copy_async(self, shared, source, *, evict_first=False, where=None):
        hint, policy, operand = cache_policy(evict_first, 2)
        if evict_first:
            # Works around ptxas 13.0 and 13.5: if the shared address is [register + uniform register], they
            # put the cache policy into registers other than those that the instruction reads, which is an
            # illegal instruction at best. The minimum changes no address, but hides the sum from ptxas.
            (shared,) = assemble("min.u32 $0, $1, 0x7fffffff;", [shared], ("i32",))
        predicate, condition = ("", []) if where is None else (f"@${2 + len(policy)} ", [where])
        template = f"{predicate}cp.async.cg.shared.global{hint} [$0], [$1], 16{operand};"
        assemble(template, [shared, source, *policy, *condition], effects=True)

    def commit_copies(self):
        assemble("cp.async.commit_group;", [], effects=True)

    def wait_copies(self, pending):
        assemble(f"cp.async.wait_group {pending};", [], effects=True)

    # The memory model makes no promise about a vector of words, but an access of 64 bits is one. The loop
    # keeps its registers apart from the outputs, which the compiler may place in those of the inputs.
    def store_flagged(self, address, numbers, flag):
        template = (
            "{ .reg .b64 a, b; mov.b64 a, {$1, $3}; mov.b64 b, {$2, $3}; "
            "st.relaxed.sys.global.v2.b64 [$0], {a, b}; }"
        )
        words = [self.float_to_bits(number) for number in numbers]
        assemble(template, [address, *words, flag], effects=True)

    def wait_flagged(self, address, flag):
        template = (
            "{ .reg .b64 a, b; .reg .b32 x, y, f, g; .reg .pred p; "
            "WAIT: ld.relaxed.sys.global.v2.b64 {a, b}, [$2]; mov.b64 {x, f}, a; mov.b64 {y, g}, b; "
            "setp.ne.u32 p, f, $3; setp.ne.or.u32 p, g, $3, p; @p bra WAIT; "
            "mov.b32 $0, x; mov.b32 $1, y; }"
        )
        words = assemble(template, [address, flag], ("i32", "i32"), effects=True)
        return [self.bits_to_float(word) for word in words]

    def trap_unless(self, condition):
        assemble("@!$0 trap;", [condition], effects=True)

    def block_barrier(self):
        gpu.barrier()

    def cluster_barrier(self):
        assemble("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", [], warp=True)

    def warp_barrier(self):
        assemble(f"bar.warp.sync {_ALL_LANES};", [], warp=True)

    def shuffle_xor(self, value, mask):
        template = f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, {_ALL_LANES};"
        return assemble(template, [value], (value.kind,), warp=True)[0]

    def ballot(self, condition):
        return assemble(f"vote.sync.ballot.b32 $0, $1, {_ALL_LANES};", [condition], ("i32",), warp=True)[0]

    def lower_lanes(self):
        return assemble("mov.u32 $0, %lanemask_lt;", [], ("i32",))[0]

    def reduce_max(self, value):
        return assemble(f"redux.sync.max.u32 $0, $1, {_ALL_LANES};", [value], ("i32",), warp=True)[0]

    def reduce_add(self, value):
        return assemble(f"redux.sync.add.s32 $0, $1, {_ALL_LANES};", [value], ("i32",), warp=True)[0]

    def matrix_multiply_add(self, c, a, b):
        template = (
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return assemble(template, [*a, *b, *c], ("i32",) * 4)

    def matrix_multiply_add_bfloat16(self, c, a, b):
        template = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        return assemble(template, [*a, *b, *c], ("f32",) * 4)

    @contextlib.contextmanager
    def when(self, condition):
        branch = scf.IfOp(condition.ssa)
        with ir.InsertionPoint(branch.then_block):
            yield
            scf.yield_([])

    def loop(self, count, carry, body):
        zero, one = constant(0, "i32"), constant(1, "i32")
        loop = scf.ForOp(zero.ssa, count.ssa, one.ssa, [v.ssa for v in carry])
        with ir.InsertionPoint(loop.body):
            inner = [PtxValue(a, v.kind) for a, v in zip(loop.inner_iter_args, carry, strict=True)]
            out = body(PtxValue(loop.induction_variable, "i32"), inner)
            scf.yield_([v.ssa for v in out])
        return [PtxValue(r, v.kind) for r, v in zip(loop.results, carry, strict=True)]


class PeerPtxInstructions(PtxInstructions, PeerInstructions):
    """The instructions of a program on all devices."""

    def device_index(self):
        return PtxValue(self.context.device_id(), "i32")

    def peer_address(self, ref, device):
        remote = self.context.to_remote(ref, constant(device, "i32").ssa)
        address = PtxValue(llvm.ptrtoint(mlir_type("i64"), mosaic.memref_ptr(remote)), "i64")
        return [
            PtxValue(arith.trunci(mlir_type("i32"), word.ssa), "i32") for word in (address, address >> 32)
        ]
