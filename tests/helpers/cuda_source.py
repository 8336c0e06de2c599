"""Writes lane programs as CUDA C++, so that nvcc assembles them for GPUs that are absent.

The inline assembly is that of the PTX back end. Mosaic GPU compiles the rest of a program, arithmetic and
control flow, to other machine code than nvcc.
"""

import contextlib
import itertools
import re
import shutil
import struct
import subprocess
from collections.abc import Callable

from pallas_kernels.lanes import ptx, ptx_hopper, ptx_values
from pallas_kernels.lanes.registers import Value

NVCC = shutil.which("nvcc")

_TYPES = {"i32": "unsigned", "i64": "unsigned long long", "f32": "float", "bool": "bool"}
_OPERATORS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "and": "&",
    "or": "|",
    "xor": "^",
    "shl": "<<",
    "shr": ">>",
    "div": "/",
    "rem": "%",
    "lt": "<",
    "ge": ">=",
    "eq": "==",
}


class CudaValue(Value):
    """A variable or a literal."""

    def __init__(self, source: "CudaInstructions", text: str, kind):
        self.source, self.text, self.kind = source, text, kind

    def binary(self, operation, other):
        other = other if isinstance(other, CudaValue) else self.source.constant(other, self.kind)
        signed = operation in ("lt", "ge") and self.kind == "i32"
        left, right = (f"(int){x.text}" if signed else x.text for x in (self, other))
        kind = "bool" if operation in ("lt", "ge", "eq") else self.kind
        return self.source.variable(kind, f"{left} {_OPERATORS[operation]} {right}")


class CudaInstructions(ptx.PtxInstructions):
    """Collects the statements of a program. Refs are names of parameters; None is the shared memory."""

    def __init__(self):
        super().__init__(None)
        self.statements: list[str] = []
        self.count = 0
        self.tensor_maps: dict[tuple, str] = {}

    def variable(self, kind, expression: str | None = None) -> CudaValue:
        self.count += 1
        initial = "" if expression is None else f" = {expression}"
        self.statements.append(f"{_TYPES[kind]} v{self.count}{initial};")
        return CudaValue(self, f"v{self.count}", kind)

    def assemble(self, template, inputs, outputs=(), *, effects=False, warp=False, tied=0):
        """Emits a statement of inline assembly, as ``ptx_values.assemble`` does."""
        tied_inputs, inputs, predicates = inputs[:tied], list(inputs[tied:]), ""
        text = template.replace("%", "%%")
        for i, value in enumerate(inputs, len(outputs) + tied):
            if value.kind == "bool":
                predicates += f".reg .pred p{i}; setp.ne.u32 p{i}, %{i - tied}, 0; "
                text = re.sub(rf"\${i}(?!\d)", f"p{i}", text)
                inputs[i - len(outputs) - tied] = self.variable("i32", f"{value.text} ? 1u : 0u")
        # A tied register is written "+", and has one number instead of two.
        numbers = [*range(len(outputs)), *[0] * tied, *range(len(outputs), len(outputs) + len(inputs))]
        text = re.sub(r"\$(\d+)", lambda match: f"%{numbers[int(match[1])]}", text)
        text = f"{{ {predicates}{text} }}" if predicates else text
        results = [
            self.variable(kind, tied_inputs[i].text if i < tied else None) for i, kind in enumerate(outputs)
        ]
        registers = ptx_values._REGISTER
        signs = ["+" if i < tied else "=" for i in range(len(outputs))]
        written = ", ".join(
            f'"{sign}{registers[v.kind]}"({v.text})' for sign, v in zip(signs, results, strict=True)
        )
        read = ", ".join(f'"{registers[v.kind]}"({v.text})' for v in inputs)
        is_ordered = effects or warp
        clobbers = ' : "memory"' if is_ordered else ""
        volatile = "volatile" if is_ordered or not outputs else ""
        self.statements.append(f'asm {volatile}("{text}" : {written} : {read}{clobbers});')
        return results

    def constant(self, value, kind="i32"):
        match kind:
            case "f32":
                (bits,) = struct.unpack("<I", struct.pack("<f", float(value)))
                return CudaValue(self, f"__uint_as_float(0x{bits:x}u)", kind)
            case "bool":
                return CudaValue(self, "true" if value else "false", kind)
        width, suffix = (32, "u") if kind == "i32" else (64, "ull")
        return CudaValue(self, f"0x{int(value) % 2**width:x}{suffix}", kind)

    def global_address(self, ref):
        return self.variable("i64", f"(unsigned long long){ref}")

    def shared_address(self, ref):
        return self.variable("i32", "(unsigned)__cvta_generic_to_shared(shared)")

    def select(self, condition, yes, no):
        return self.variable(yes.kind, f"{condition.text} ? {yes.text} : {no.text}")

    def bits_to_float(self, word):
        return self.variable("f32", f"__uint_as_float({word.text})")

    def float_to_bits(self, number):
        return self.variable("i32", f"__float_as_uint({number.text})")

    def int_to_float(self, number):
        return self.variable("f32", f"__int2float_rn((int){number.text})")

    def widen(self, word):
        return self.variable("i64", f"(unsigned long long){word.text}")

    def maximum(self, a, b):
        return self.variable("i32", f"max({a.text}, {b.text})")

    def _tensor_map(self, ref, box):
        name = self.tensor_maps.setdefault((ref, box), f"map{len(self.tensor_maps)}")
        return self.variable("i64", f"(unsigned long long)&{name}")

    def undefined(self, kind):
        return self.variable(kind)

    def block_barrier(self):
        self.statements.append("__syncthreads();")

    @contextlib.contextmanager
    def when(self, condition):
        self.statements.append(f"if ({condition.text}) {{")
        yield
        self.statements.append("}")

    def loop(self, count, carry, body):
        state = [self.variable(value.kind, value.text) for value in carry]
        self.count += 1
        index = CudaValue(self, f"i{self.count}", "i32")
        header = f"for (unsigned {index.text} = 0; (int){index.text} < (int){count.text}; ++{index.text}) {{"
        self.statements += ["#pragma unroll 1", header]
        results = [self.variable(value.kind, value.text) for value in body(index, list(state))]
        self.statements += [f"{old.text} = {new.text};" for old, new in zip(state, results, strict=True)]
        self.statements.append("}")
        return state


def assemble(monkeypatch, tmp_path, program: Callable, refs: list, threads: int, architecture: str) -> str:
    """Assembles ``program(isa, refs)``; returns what ptxas reports: registers, and bytes that it spills.

    Args:
      monkeypatch, tmp_path: Fixtures of pytest.
      program: Lane program.
      refs: A name for each array in global memory, and None for the shared memory.
      threads: Number of threads of a CTA.
      architecture: Architecture of the GPU, such as ``sm_90a``.

    Raises:
      AssertionError: nvcc refuses the source; the message is its report.
    """
    isa = CudaInstructions()
    replaced = {"assemble": isa.assemble, "constant": isa.constant, "PtxValue": CudaValue}
    for module, (name, value) in itertools.product((ptx, ptx_hopper, ptx_values), replaced.items()):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    program(isa, refs)
    parameters = ", ".join(
        [f"char* __restrict__ {ref}" for ref in refs if ref is not None]
        + [f"const __grid_constant__ TensorMap {name}" for name in isa.tensor_maps.values()]
    )
    source = tmp_path / "program.cu"
    source.write_text(
        "struct alignas(64) TensorMap { char bytes[128]; };\n"
        "extern __shared__ __align__(1024) char shared[];\n"
        f'extern "C" __global__ void __launch_bounds__({threads}) program({parameters}) {{\n'
        + "\n".join(isa.statements)
        + "\n}\n"
    )
    command = [NVCC, f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr
