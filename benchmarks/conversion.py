"""Measures the time of a conversion, stage by stage, and its memory, for a model of a published shape.

    python benchmarks/conversion.py --shape Qwen3-8B --work /tmp/qwen3-8b --output FILE
    python benchmarks/conversion.py --shape Qwen3-8B --layers 4 --work /tmp/four --output FILE   a quick look
    python benchmarks/conversion.py --shape Llama-135M --work /tmp/llama-135m --output FILE      a small model

Writes a Hugging Face checkpoint of that shape, with random weights and the bundled model's tokenizer, to
``WORK/model`` unless it is there. Then runs the real command, ``python -m checkpoints_tools.convert``, in
this process, with a progress bar that records every step: seconds by the clock, CPU seconds of all threads
(user and system), and the programs that XLA compiled with the seconds that this took. CPU seconds are
comparable on a machine that others use as well.

An interrupted run resumes when started again with the same arguments: it reuses the weights, the converter
resumes, and the report, which is written after every step, gets an entry for each run.

Random weights need the time and memory of trained ones, with one exception: the tokens of the bundled model's
tokenizer lie in few ranges of a large vocabulary, and only those ranges of the embedding are read.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import random_checkpoint

from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert import compilation
from checkpoints_tools.convert.sizes import directory_bytes
from grinqh_jax.benchmarking import random_model
from grinqh_jax.cli.progress import Progress
from grinqh_jax.memory import peak_host_memory

STAGES = {
    "forward": "forward",
    "backward": "backward",
    "embed": "embedding",
    "measure layers": "measurements",
    "measure lm_head": "head's measurements",
    "refit layers": "refit",
    "refit lm_head": "head's refit",
    "gains": "gains",
    "finalize": "finalize",
}
"""Stage of a step, by the beginning of its note. The first step of a stage includes the time since the stage
before: the eigenvectors and the head's sensitivities count for ``backward``, the placing of thresholds for
``refit``."""

LLAMA_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""A small model of the Llama family, in the shape of SmolLM2-135M."""

WARM_UP = 2
"""Number of steps of a stage that may compile. The others give the seconds of a layer or a training step."""

SLOWEST = 20
"""Number of functions whose compilation times are reported, longest first."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tensorstore", "safetensors")


class Cost(NamedTuple):
    """Cost of a step, or of several.

    Attributes:
      seconds: Seconds by the clock.
      cpu_seconds: CPU seconds of all threads, user and system.
      programs: Number of programs that XLA compiled, or read from the persistent cache.
      compile_seconds: Seconds of these compilations by the clock, tracing and lowering included.
    """

    seconds: float
    cpu_seconds: float
    programs: int
    compile_seconds: float

    @classmethod
    def so_far(cls) -> "Cost":
        """Returns the cost of this process so far."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.monotonic(), usage.ru_utime + usage.ru_stime, _compiled.programs, _compiled.seconds)

    def since(self, earlier: "Cost") -> "Cost":
        """Returns the cost since an earlier one."""
        return Cost(*(now - then for now, then in zip(self, earlier, strict=True)))

    def rounded(self) -> dict[str, float]:
        """Returns the record of a report."""
        return {name: round(value, 3) for name, value in self._asdict().items()}


@dataclasses.dataclass
class _Compilations:
    programs: int = 0
    seconds: float = 0.0
    seconds_of: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def listen(self, event: str, seconds: float, fun_name: str = "unnamed", **_: object) -> None:
        """Counts an event of ``jax.monitoring``."""
        if "/jax/core/compile/" in event:
            self.programs += event.endswith("backend_compile_duration")
            self.seconds += seconds
            self.seconds_of[fun_name.partition(" at ")[0]] += seconds


_compiled = _Compilations()


class TimedProgress(Progress):
    """The converter's progress bar, which calls ``record`` with the note and the cost of every step."""

    def __init__(self, record: Callable[[str, Cost], None], description: str, total: float):
        super().__init__(description, total)
        self._record = record
        self._last = Cost.so_far()

    def __call__(self, units: float, note: str = "") -> None:
        self._step(note)
        super().__call__(units, note)

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if exc_info[0] is None:
            self._step("finalize")

    def _step(self, note: str) -> None:
        now = Cost.so_far()
        self._record(note, now.since(self._last))
        self._last = now


def stages(steps: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Returns the cost of each stage, seconds of its first step, and of a layer if there are enough steps."""
    costs: dict[str, list[Cost]] = {}
    for step, cost in steps.items():
        stage = next(stage for prefix, stage in STAGES.items() if step.startswith(prefix))
        costs.setdefault(stage, []).append(cost)
    rows = {}
    for stage, parts in costs.items():
        row = Cost(*map(sum, zip(*parts, strict=True))).rounded()
        row["first"] = round(parts[0].seconds, 3)
        if later := parts[WARM_UP:]:
            each = "each_step" if stage == "gains" else "each_layer"
            row[each] = round(sum(cost.seconds for cost in later) / len(later), 3)
            row[f"{each}_cpu"] = round(sum(cost.cpu_seconds for cost in later) / len(later), 3)
        rows[stage] = row
    return rows


def timed_conversion(command: list[str], out: pathlib.Path, report: dict, output: pathlib.Path) -> int:
    """Runs the converter, adds a run to the report, and returns the exit code."""

    def save() -> None:
        writing = output.with_name(output.name + ".writing")
        writing.write_text(json.dumps(report, indent=1) + "\n")
        writing.rename(output)

    written = {step for run in report["runs"] for step in run["steps"] if step.startswith("refit layers.")}
    steps: dict[str, Cost] = {}
    recorded: dict[str, dict[str, float]] = {}
    run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "steps": recorded}
    report["runs"].append(run)

    def record(step: str, cost: Cost) -> None:
        if step in written:
            return
        steps[step], recorded[step] = cost, cost.rounded()
        memory = jax.local_devices()[0].memory_stats() or {}
        run["stages"] = stages(steps)
        run["peak_host_bytes"] = peak_host_memory()
        run["peak_device_bytes"] = memory.get("peak_bytes_in_use")
        run["compile_seconds_of"] = {
            name: round(spent, 2) for name, spent in _compiled.seconds_of.most_common(SLOWEST)
        }
        print(f"[{time.monotonic() - start.seconds:5.0f}s] {step}: {cost.seconds:.2f} s", flush=True)
        save()

    convert.Progress = functools.partial(TimedProgress, record)
    start = Cost.so_far()
    if code := convert.main(command):
        return code
    run |= Cost.so_far().since(start).rounded()
    run["bytes_on_disk"] = directory_bytes(out)
    each = sum(row.get("each_layer", 0) for row in run["stages"].values())
    if each and not written:
        # Attributes all of a training step to the layers, which overestimates rather than underestimates.
        training = sum(step.startswith("gains") for step in steps)
        each += training * run["stages"].get("gains", {}).get("each_step", 0) / report["layers"]
        missing = report["layers_of_shape"] - report["layers"]
        run |= {"each_layer": round(each, 3), "of_all_layers": round(run["seconds"] + missing * each, 1)}
    save()
    print_table(run)
    return 0


def print_table(run: dict) -> None:
    """Prints the costs of the stages and of the whole run."""
    names = Cost._fields
    print(f"{'stage':22}" + "".join(f"{name:>17}" for name in names))
    for stage, row in {**run["stages"], "all": run}.items():
        print(f"{stage:22}" + "".join(f"{row[name]:17,.1f}" for name in names))
    print(f"peak memory of the host {run['peak_host_bytes'] / 2**20:,.0f} MiB", end="")
    print(f", device {run['peak_device_bytes'] / 2**20:,.0f} MiB" if run["peak_device_bytes"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shapes = random_model.hf_configs() | {"Llama-135M": LLAMA_135M}
    add = parser.add_argument
    add("--shape", default="Qwen3-8B", choices=shapes, help="published shape (default: Qwen3-8B)")
    add("--config", type=pathlib.Path, metavar="FILE", help="config.json of another shape")
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens (default: 32768)")
    add(
        "--warm",
        action="store_true",
        help="use the programs that an earlier run compiled (default: compile all)",
    )
    add("--calib", type=pathlib.Path, metavar="FILE", help="calibration text (default: the bundled one)")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for both checkpoints")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else shapes[args.shape]
    layers_of_shape = config["num_hidden_layers"]
    config["num_hidden_layers"] = args.layers or layers_of_shape

    compilation.prepare()  # before random weights are made: XLA reads its flags once
    jax.config.update("jax_enable_compilation_cache", args.warm)
    jax.monitoring.register_event_duration_secs_listener(_compiled.listen)
    model, out = args.work / "model", args.work / "out"
    start = time.monotonic()
    if not (model / "config.json").exists():
        random_checkpoint.write(model, config)
    elif json.loads((model / "config.json").read_text()) != config:
        parser.error(f"{model} is of another shape: choose another --work")
    print(f"weights written in {time.monotonic() - start:.1f} s", flush=True)

    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "shape": str(args.config or args.shape),
        "layers": config["num_hidden_layers"],
        "layers_of_shape": layers_of_shape,
        "tokens": args.tokens,
        "model_bytes": directory_bytes(model),
        "runs": [],
    }
    if args.output.exists() and (args.work / "out.partial").exists():
        earlier = json.loads(args.output.read_text())
        if earlier["command"] == report["command"] and "seconds" not in earlier["runs"][-1]:
            report["runs"] = earlier["runs"]
    command = ["--model", str(model), "--out", str(out), "--tokens", str(args.tokens), "--force"]
    command += ["--calib", str(args.calib)] if args.calib else []
    return timed_conversion(command, out, report, args.output)


if __name__ == "__main__":
    sys.exit(main())
