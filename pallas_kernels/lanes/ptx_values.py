"""The registers of the PTX back end, and its inline assembly statements."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.lanes.registers import Kind, Value

_INTEGER = {
    "add": arith.addi,
    "sub": arith.subi,
    "mul": arith.muli,
    "and": arith.andi,
    "or": arith.ori,
    "xor": arith.xori,
    "shl": arith.shli,
    "shr": arith.shrui,
    "div": arith.divui,
    "rem": arith.remui,
}
_FLOAT = {"add": arith.addf, "sub": arith.subf, "mul": arith.mulf}
_COMPARE_INTEGER = {
    "lt": arith.CmpIPredicate.slt,
    "ge": arith.CmpIPredicate.sge,
    "eq": arith.CmpIPredicate.eq,
}
_COMPARE_FLOAT = {"lt": arith.CmpFPredicate.OLT, "ge": arith.CmpFPredicate.OGE}

_REGISTER = {"i32": "r", "i64": "l", "f32": "f", "bool": "b"}
"""Inline assembly constraint of each kind."""


def mlir_type(kind: Kind) -> ir.Type:
    width = {"i32": 32, "i64": 64, "bool": 1}
    return ir.F32Type.get() if kind == "f32" else ir.IntegerType.get_signless(width[kind])


def constant(value: int | float, kind: Kind) -> "PtxValue":
    if kind == "f32":
        attribute = ir.FloatAttr.get(mlir_type(kind), float(value))
    else:
        value = int(value)
        attribute = ir.IntegerAttr.get(
            mlir_type(kind), value - 2**32 if kind == "i32" and value >= 2**31 else value
        )
    return PtxValue(arith.constant(mlir_type(kind), attribute), kind)


class PtxValue(Value):
    """An MLIR SSA value."""

    def __init__(self, ssa: ir.Value, kind: Kind):
        self.ssa, self.kind = ssa, kind

    def binary(self, operation, other):
        if not isinstance(other, PtxValue):
            other = constant(other, self.kind)
        is_float = self.kind == "f32"
        if operation in _COMPARE_INTEGER:
            compare, table = (arith.cmpf, _COMPARE_FLOAT) if is_float else (arith.cmpi, _COMPARE_INTEGER)
            return PtxValue(compare(table[operation], self.ssa, other.ssa), "bool")
        return PtxValue((_FLOAT if is_float else _INTEGER)[operation](self.ssa, other.ssa), self.kind)


def assemble(
    template: str,
    inputs,
    outputs: tuple[Kind, ...] = (),
    *,
    effects: bool = False,
    warp: bool = False,
    tied: int = 0,
) -> list[PtxValue]:
    """Emits one inline assembly statement and returns its outputs.

    Args:
      template: Assembly text; ``$0, $1 ..`` number the outputs, then the inputs.
      inputs: Registers that the statement reads.
      outputs: Kinds of the registers that it writes.
      effects: Whether the compiler must not remove or merge the statement, or reorder it with other
        statements that have effects.
      warp: Whether the statement exchanges data between lanes. Implies ``effects``, and keeps the compiler
        from moving the statement into divergent code.
      tied: Number of the first inputs that are in the registers of the first outputs.
    """
    # An input that is also a tied one must not be in the register that the statement writes ("&").
    constraints = [f"={'&' * (i < tied)}{_REGISTER[kind]}" for i, kind in enumerate(outputs)]
    constraints += [str(i) for i in range(tied)]
    constraints += [_REGISTER[v.kind] for v in inputs[tied:]]
    types = [mlir_type(kind) for kind in outputs]
    if not types:
        result = ir.Type.parse("!llvm.void")
    else:
        result = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    out = llvm.inline_asm(
        result,
        [v.ssa for v in inputs],
        template,
        ",".join(constraints),
        has_side_effects=effects or warp,
        convergent=warp,
    )
    if not types:
        return []
    if len(types) == 1:
        return [PtxValue(out, outputs[0])]
    return [PtxValue(llvm.extractvalue(t, out, [i]), outputs[i]) for i, t in enumerate(types)]


def operands(count: int, first: int) -> str:
    """Returns the text of an operand: ``$3`` for one register, ``{$3,$4}`` for a vector of two."""
    names = [f"${first + i}" for i in range(count)]
    return names[0] if count == 1 else "{" + ",".join(names) + "}"


def cache_policy(evict_first: bool, number: int) -> tuple[str, list[PtxValue], str]:
    """Returns the modifier, register and operand ``number`` that ``evict_first`` adds to a memory access."""
    if not evict_first:
        return "", [], ""
    policy = assemble("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", [], ("i64",))
    return ".L2::cache_hint", policy, f", ${number}"
