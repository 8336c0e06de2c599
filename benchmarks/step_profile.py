"""Breaks the time of a decode step down by category, from the profiler's trace of its kernels.

XLA names a kernel after its HLO instruction. The ``op_name`` of that instruction holds the named scopes of
the library's source (``norm``, ``attention``, ...), which are the categories here. Other kernels (this
library's, cuBLAS) are recognised by their names.

The profiler stretches the pauses between kernels, so the time without a kernel does not come from the trace.
It is the step's time by the clock minus the time of all kernels.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence

import jax

from grinqh_jax.model.apply import in_head

GRADED = re.compile(r"graded_(matvec|experts)_kernel")
MATVEC = re.compile(r"graded_matvec|gemm|gemv|nvjet|cutlass|cublas|splitK|xmma|s16816gemm", re.IGNORECASE)
EXCHANGE = re.compile(r"nccl|all.?reduce|all.?gather|exchange_(add_norm_)?kernel|open_mailbox", re.IGNORECASE)
"""Kernels that exchange data between the devices of a mesh. They also wait for the slowest device."""
OWN_KERNELS = {
    "attention_kernel": "attention",
    "add_norm_kernel": "norm",
    "swiglu_kernel": "mlp",
    "swiglu_experts_kernel": "mlp",
    "router_kernel": "router",
}
SCOPES = (
    "sampling",
    "grading_stats",
    "dial",
    "attention",
    "norm",
    "mlp",
    "router",
    "embed",
    "experts",
    "lookup",
)
"""Named scopes of the library's source, inner ones before those that contain them."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel launch: name, start and duration in microseconds."""

    name: str
    start: float
    duration: float


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Microseconds and launches per decode step.

    Attributes:
      span: Time of a step by the clock, microseconds.
      categories: Category -> (microseconds, launches). ``no kernel`` is the time without a kernel.
      kernels: (Name, category) -> (microseconds, launches).
    """

    span: float
    categories: dict[str, tuple[float, float]]
    kernels: dict[tuple[str, str], tuple[float, float]]

    def lines(self, largest: int = 25) -> list[str]:
        """Returns the lines of a table: the categories, then the ``largest`` kernels by time."""
        lines = [f"{'category':<14}{'us/step':>10}{'share':>8}{'launches':>10}"]
        for name, (time, count) in sorted(self.categories.items(), key=lambda item: -item[1][0]):
            lines.append(f"{name:<14}{time:>10.1f}{time / self.span:>8.1%}{count:>10.1f}")
        lines.append(f"{'sum':<14}{self.span:>10.1f}")
        ranked = sorted(self.kernels.items(), key=lambda item: -item[1][0])[:largest]
        for (name, category), (time, count) in ranked:
            each = time / count if count else 0.0
            lines.append(f"  {name[:44]:<45}{category:<12}{time:>9.1f}{count:>8.1f} x {each:.2f}")
        return lines

    def to_json(self) -> dict:
        """Returns the span, and each category's microseconds and launches per step."""
        categories = {
            name: {"us": round(time, 2), "launches": round(count, 2)}
            for name, (time, count) in self.categories.items()
        }
        return {"span_us": round(self.span, 2), "categories": categories}


def trace(function: Callable[[], object]) -> list[Kernel]:
    """Runs ``function`` once under the profiler; returns the first GPU's kernels in order of their start.

    All GPUs of a mesh run the same kernels.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(function())
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        kernels = [
            Kernel(event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
            for plane in data.planes
            if plane.name.endswith("/device:GPU:0")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def scopes_by_kernel(hlo: str) -> dict[str, str]:
    """Maps kernel names to categories by the ``op_name`` of the instructions of an optimized HLO."""
    scopes = {}
    for name, op_name in re.findall(r'%([\w.-]+) = .*?metadata=\{op_name="([^"]*)"', hlo):
        parts = op_name.split("/")
        scopes[re.sub(r"[.-]", "_", name)] = next((s for s in SCOPES if s in parts), "other")
    return scopes


def tabulate(kernels: list[Kernel], steps: int, hlo: str, linears: Sequence[str], span: float) -> StepTable:
    """Averages a trace over its decode steps.

    Args:
      kernels: Kernels in order of their start.
      steps: Number of decode steps in the trace.
      hlo: Optimized HLO of the traced function.
      linears: Names of the model's linear layers in the order in which they run.
      span: Time of a step by the clock without the profiler, microseconds.
    """
    scopes = scopes_by_kernel(hlo)
    categories: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    by_name: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    seen = 0
    # In a graded model cuBLAS computes only the routers of mixtures.
    products = GRADED if any(GRADED.search(kernel.name) for kernel in kernels) else MATVEC
    for kernel in kernels:
        if products.search(kernel.name):
            category = "head" if in_head(linears[seen % len(linears)]) else "matvec"
            seen += 1
        elif MATVEC.search(kernel.name):
            category = "router"
        elif EXCHANGE.search(kernel.name):
            category = "exchange"
        elif re.search(r"memcpy|memset|^copy|^wrapped_copy", kernel.name, re.IGNORECASE):
            category = "copies"
        else:
            own = [category for name, category in OWN_KERNELS.items() if name in kernel.name]
            category = own[0] if own else scopes.get(re.sub(r"[.-]", "_", kernel.name), "other")
        for table, key in ((categories, category), (by_name, (kernel.name, category))):
            table[key][0] += kernel.duration
            table[key][1] += 1
    per_step = {key: (time / steps, count / steps) for key, (time, count) in categories.items()}
    per_kernel = {key: (time / steps, count / steps) for key, (time, count) in by_name.items()}
    per_step["no kernel"] = span - sum(time for time, _ in per_step.values()), 0.0
    return StepTable(span, per_step, per_kernel)
