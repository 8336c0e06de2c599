"""Compiles the engine's programs on a CPU for an H200 that is not there, and counts what they launch.

    python benchmarks/absent_gpu.py --program chunk speculative --rows 1 8 --output FILE
    XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE python benchmarks/absent_gpu.py --program chunk

It needs jax's CUDA plugin, and neither GPU nor driver: ``pip install 'grinqh-jax[gpu]'``. Without a GPU XLA
measures no algorithms, so its own products, as in prefill, may run other kernels there. cuDNN's attention
asks the device when it is lowered, so the attention of a prefill here is XLA's, which keeps scores in memory.

A table counts the launches at each place of a program: once, at each step of a loop, or in a branch. Those in
a command buffer (CUDA graph) are one launch of the host. "a layer" is the difference between the numbers of
layers. Below are XLA's launches, with the shapes of their results and the lines of our code.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # The plugin else looks for a driver.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")  # Each instruction has one line of our code.

import jax
import jax.numpy as jnp
import matvec
import numpy as np
import report
from flax import traverse_util
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.programs import Lowering
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import lowerings
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.model import decoder, flat_model
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding.cutting import cut_leaves
from grinqh_jax.sharding.rules import partition

ROOT = f"{pathlib.Path(__file__).resolve().parents[1]}/"
DESCRIPTION = pathlib.Path(__file__).with_name("h200.txtpb")
"""XLA's description of an H200, a ``GpuTargetConfigProto``."""

PLUGINS = "jax-cuda13-plugin", "jax-cuda12-plugin"
SLOTS, PAGE_SIZE, STOP_TOKENS = 16, 64, 16
"""Sizes of ``grinqh-jax serve`` with its default flags."""

RECORDED = {"chunk": "generate", "speculative": "speculate"}
"""Names of programs in ``rehearsal.lowerings``, where they differ."""


class AbsentArray(jax.ShapeDtypeStruct):
    """An array of a model on an absent device. Modules read it as ``array[...]``."""

    def __getitem__(self, index: Any) -> "AbsentArray":
        assert index is ..., index
        return self


def engine_device(
    config: ModelConfig, gpus: list[Any], settings: Settings, context: int, speculates: bool
) -> Device:
    """Returns the engine's device on absent GPUs; their abstract mesh is in use."""
    leaves = traverse_util.flatten_dict(decoder.abstract_tree(config, 8, len(random_model.TARGETS)), sep=".")
    cut, one = None, SingleDeviceSharding(gpus[0])
    if len(gpus) > 1:
        mesh = Mesh(np.array(gpus), (AXIS,), axis_types=(AxisType.Auto,))
        cut = dataclasses.replace(partition(config, jax.sharding.get_abstract_mesh()), mesh=mesh)
        leaves = cut_leaves(config, leaves, cut)

    def absent(leaf: Any, sharding: Any = None) -> AbsentArray:
        sharding = sharding or getattr(leaf, "sharding", None) or one
        return AbsentArray(leaf.shape, leaf.dtype, sharding=sharding)

    def stacked(sharding: Any) -> Any:
        return lambda arrays: absent(jax.eval_shape(jnp.stack, arrays), sharding)

    tree = traverse_util.unflatten_dict({name: absent(leaf) for name, leaf in leaves.items()}, sep=".")
    pages = context // PAGE_SIZE
    sizes = {"slots": SLOTS, "max_context": context, "page_size": PAGE_SIZE, "num_pages": SLOTS * pages}
    shape = Shape(**sizes, prefill_chunk=512, stop_tokens=STOP_TOKENS, grammars=True)
    speculation = Speculation(PromptLookup()) if speculates else None
    policy, options = DecodePolicy.for_engine(), {"speculation": speculation, "abstract": True}
    with mock.patch.object(jnp, "asarray", lambda array: array):  # Routers make arrays of what they get.
        model = decoder.Decoder.from_tree(config, tree, jnp.bfloat16, cut)
    dial = jax.eval_shape(lambda model: Dial.create(model, random_model.TARGETS, np.array([3.0])), model)
    with mock.patch.object(flat_model, "_stacking", stacked):  # Even an abstract device stacks small arrays.
        return Device(model, dial, shape, policy, settings, **options)


def programs(device: Device, settings: Settings, name: str, args: Any) -> Iterator[tuple[str, Lowering]]:
    """Yields labels and lowerings of the engine's programs of a name."""
    shapes = device.step_shapes
    if name not in RECORDED:
        cases = [(f"{name}, {width} tokens", shapes[:1], [width]) for width in args.tokens]
        cases = cases if name == "prefill" else [(name, shapes[:1], [])]
    else:
        chosen = [
            step for step in shapes if step.texts in args.rows and bool(step.drafts) == (name != "chunk")
        ]
        cases = [(f"{name}, {step.texts} texts, {step.drafts} drafts", [step], []) for step in chosen]
    for label, device.step_shapes, widths in cases:
        found = [
            lowering
            for key, lowering in lowerings(device, widths, settings, [(True, False)]).items()
            if key[0] == RECORDED.get(name, name) and ("greedy", False) not in key
        ]
        assert found, f"the engine has no program {label}"
        for lowering in found:
            pages = lowering.keywords.get("pages_read")  # of prefill
            yield label if pages is None else f"{label} of {pages * PAGE_SIZE}", lowering


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch, loop or branch of a program.

    Attributes:
      place: "once", or the loops and branches around it, as in "loop/true_branch".
      buffer: Number of its command buffer; None outside.
      kind: Name of our kernel, or what XLA launches.
      origin: HLO instruction, shape of the result, JAX operation, and line of our code.
    """

    place: str
    buffer: int | None
    kind: str
    origin: str


KINDS = {
    "While|Conditional": "loops and branches",
    "Async": "starts and waits of another stream",
    "Copy|Memcpy|ToHost|ToDevice": "copies",
    "Memset|Memzero": "memsets",
    "All|Collective|Permute|ReduceScatter|Nccl|Send|Recv": "collectives",
    "Kernel|Fusion": "XLA fusions",
    "": "library calls",
}
"""Kinds of XLA's launches by patterns of its thunks; the first that matches."""


def launches(sequence: str, metadata: str, hlo: str) -> list[Launch]:
    """Returns the launches of a program.

    Args:
      sequence: XLA's ``thunk_sequence*.txt``, whose indentation tells what is in what.
      metadata: XLA's ``thunk_metadata.txt``, with the HLO instruction of each thunk.
      hlo: Text of the compiled program.
    """
    names = {id: name for name, id in re.findall(r'annotation: "([^"]+)"\s+thunk_id: (\d+)', metadata)}
    instructions = dict(re.findall(r"^\s+(?:ROOT )?%(\S+) = (.*)$", hlo, re.MULTILINE))
    files = dict(re.findall(r'^(\d+) "(.*)"$', hlo.partition("\nFunctionNames")[0], re.MULTILINE))
    lines = {
        id: f"{files[file]}:{line}".removeprefix(ROOT)
        for id, file, line in re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", hlo, re.MULTILINE)
    }
    frames = dict(re.findall(r"^(\d+) \{file_location_id=(\d+)", hlo, re.MULTILINE))
    result: list[Launch] = []
    around: list[tuple[int, str | None, int | None]] = []  # indentation, label, command buffer
    buffers, control = 0, 0
    for line in sequence.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if text == "condition:":  # XLA does not indent it.
            indent = control + 2
        while around and around[-1][0] >= indent:
            around.pop()
        thunk = re.match(r"(\d+): k(\w+)", text)
        if thunk is None:
            around.append((indent, "loop" if text == "body:" else text.removesuffix(":"), None))
        elif thunk[2] == "CommandBuffer":
            around.append((indent, None, buffers))
            buffers += 1
        else:
            control = indent if thunk[2] in ("While", "Conditional") else control
            name = names.get(thunk[1].lstrip("0"), thunk[2])
            instruction = instructions.get(name, "")
            kernel = re.search(r'target="mosaic_gpu.*?op_name="[^"]*?(\w+)_kernel\b', instruction)
            kind = next(kind for pattern, kind in KINDS.items() if re.search(pattern, thunk[2]))
            shape = re.sub(r"\{[\d,]*\}|/\*.*?\*/", "", re.split(r" [\w-]+\(", instruction)[0])
            operation = re.search(r'op_name="(?:[^"]*/)?([^"/]*)"', instruction)
            frame = re.search(r"stack_frame_id=(\d+)", instruction)
            source = lines[frames[frame[1]]] if frame else ""
            origin = [name, shape, operation[1] if operation else "", source]
            place = "/".join(label for _, label, _ in around if label) or "once"
            buffer = next((number for _, _, number in reversed(around) if number is not None), None)
            result.append(
                Launch(place, buffer, kernel[1] if kernel else kind, " ".join(filter(None, origin)))
            )
    return result


def figures(found: list[Launch]) -> dict[str, Any]:
    """Returns the numbers of launches at each place, and of command buffers."""
    kinds = collections.Counter(f"{launch.place}: {launch.kind}" for launch in found)
    outside = collections.Counter(launch.place for launch in found if launch.buffer is None)
    kinds |= {f"{place}: outside of command buffers": count for place, count in outside.items()}
    buffers = collections.Counter(launch.buffer for launch in found if launch.buffer is not None)
    return dict(sorted(kinds.items())) | {
        "command buffers": len(buffers),
        "launches in them": sum(buffers.values()),
    }


def compiled(lowering: Lowering, dump: pathlib.Path) -> dict[str, Any]:
    """Compiles a program; returns its figures, and the origins of XLA's launches."""
    lowered, before, start = lowering(), set(dump.iterdir()), time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    new = sorted(set(dump.iterdir()) - before)
    texts = {kind: file for file in new for kind in ("metadata", "sequence") if f"thunk_{kind}" in file.name}
    found = launches(texts["sequence"].read_text(), texts["metadata"].read_text(), program.as_text())
    return figures(found) | {
        "temporary bytes": program.memory_analysis().temp_size_in_bytes,
        "compile seconds": round(seconds, 1),
        "launches of XLA": [f"{each.place}: {each.origin}" for each in found if each.kind in KINDS.values()],
    }


def say_table(label: str, by_layers: dict[int, dict[str, Any]]) -> None:
    """Prints the figures of a program for each number of layers, and those of a layer."""
    (few, least), (many, most) = min(by_layers.items()), max(by_layers.items())
    titles = [f"{count} layers" for count in by_layers] + ["a layer"] * (many > few)
    print(f"\n{label:<48}" + "".join(f"{title:>13}" for title in titles))
    for row in dict.fromkeys([*most, *least]):
        if row != "launches of XLA":
            values = [columns.get(row, 0) for columns in by_layers.values()]
            each = (most.get(row, 0) - least.get(row, 0)) / max(many - few, 1)
            values += [each] * (many > few and row != "compile seconds")
            print(f"{row:<48}" + "".join(f"{value:>13,.10g}" for value in values))
    print("".join(f"  {line}\n" for line in least["launches of XLA"]), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, names = parser.add_argument, ["chunk", "prefill", "insert", "free", "speculative"]
    add("--shape", default="Qwen3-8B", metavar="NAME_OR_DIR", help="default: Qwen3-8B")
    add("--layers", nargs="+", type=int, default=[2, 4], metavar="N", help="numbers of layers (default: 2 4)")
    add("--program", nargs="+", default=names, choices=names, help="default: all")
    add("--rows", nargs="+", type=int, default=[1, 8], metavar="N", help="texts of a chunk (default: 1 8)")
    add("--tokens", nargs="+", type=int, default=[512], metavar="N", help="of a prefill (default: 512)")
    add("--context", type=int, default=8192, metavar="N", help="most tokens of a text (default: 8192)")
    add("--devices", type=int, default=1, choices=(1, 2), help="absent GPUs (default: 1)")
    report.add_arguments(parser)
    args = parser.parse_args()
    if not any(map(matvec.version, PLUGINS)):
        sys.exit("the CUDA plugin of jax is missing; it needs no GPU: pip install 'grinqh-jax[gpu]'")
    whole, flags = random_model.shape(args.shape), os.environ.get("XLA_FLAGS", "")
    sampling: Any = sampling_rows(1, whole.vocab_size, temperature=0.0)
    settings = Settings.of_request(sampling, 3.0, (), 1, STOP_TOKENS)
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((args.devices,), (AXIS,), (AxisType.Auto,), abstract_device=gpu)
    with tempfile.TemporaryDirectory() as dump, jax.sharding.use_abstract_mesh(mesh):
        os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {flags} --xla_dump_to={dump}"
        fields: dict[str, Any] = {"shape": random_model.label(args.shape), "xla_flags": flags, "programs": {}}
        results = report.Report(args, device=f"{args.devices} absent NVIDIA H200", **fields)
        results.fields["versions"] |= {name: matvec.version(name) for name in PLUGINS}
        gpus = topologies.get_topology_desc(
            "h200", "cuda", topology=f"1x1x{args.devices}", target_config=DESCRIPTION.read_text()
        ).devices
        for name in args.program:
            tables: dict[str, dict[int, Any]] = collections.defaultdict(dict)
            for layers in args.layers:
                config = dataclasses.replace(whole, layers=whole.layers[:layers])
                device = engine_device(config, list(gpus), settings, args.context, name == "speculative")
                for label, lowering in programs(device, settings, name, args):
                    if not results.out_of_time(f"{label}, {layers} layers"):
                        tables[label][layers] = compiled(lowering, pathlib.Path(dump))
            for label, by_layers in tables.items():
                say_table(label, by_layers)
            results.fields["programs"] |= tables
            results.save()
    results.finish()


if __name__ == "__main__":
    main()
