"""Measures the time of a conversion, stage by stage, and its memory, for a model of a published shape.

    python benchmarks/conversion.py --shape Qwen3-8B --work /tmp/qwen3-8b --output FILE
    python benchmarks/conversion.py --shape Qwen3-8B --layers 4 --work /tmp/four --output FILE   a quick look
    python benchmarks/conversion.py --shape Llama-135M --work /tmp/llama-135m --output FILE      a small model
    python benchmarks/conversion.py --shape Qwen3-30B-A3B --layers 4 --seconds 230 --work /tmp/w --output FILE
    python benchmarks/conversion.py --shape Qwen3-30B-A3B --layers 4 --only-gains --work /tmp/g --output FILE

Writes a Hugging Face checkpoint of that shape, with random weights and the bundled model's tokenizer, to
``WORK/model`` unless it is there. Then runs the real command, ``python -m checkpoints_tools.convert``, in
this process, with a progress bar that records every step: seconds by the clock, CPU seconds of all threads
(user and system), the programs that XLA compiled with the seconds that this took, and the peak of memory so
far. CPU seconds are comparable on a machine that others use as well. From the layers that ran, it estimates
the time of all layers of the shape.

The report is written after every step. An interrupted run resumes when started again with the same arguments:
it reuses the weights, the converter resumes, and the report gets an entry for each run.

``--only-gains`` measures the last stage alone, on random codes (``conversion_gains``).

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

import conversion_gains
import jax
import random_checkpoint

from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert import compilation, train_gains
from checkpoints_tools.convert.sizes import directory_bytes
from grinqh_jax.benchmarking import random_model
from grinqh_jax.cli.progress import Progress
from grinqh_jax.memory import peak_host_memory

STAGES = {
    "forward": "forward",
    "backward": "backward",
    "codes": "random codes",
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
``refit``, and the original model's passes over the training windows for ``gains``. ``random codes`` are no
stage of a conversion."""

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


class OutOfTime(Exception):
    """Ends a conversion that has reached its limit."""


def timed_conversion(
    convert_all: Callable[[], int], out: pathlib.Path, report: dict, output: pathlib.Path, seconds: float
) -> int:
    """Calls ``convert_all`` for at most ``seconds``, adds a run to the report, and returns the exit code.

    Stages begin and end with the steps of the progress bar that ``convert_all`` takes from ``convert``.
    """

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
        recorded[step] |= {name: run[name] for name in ("peak_host_bytes", "peak_device_bytes")}
        run.update(Cost.so_far().since(start).rounded())
        if not written:
            run.update(of_all_layers(run["stages"], steps, report["layers"], report["layers_of_shape"]))
        print(f"[{run['seconds']:5.0f}s] {step}: {cost.seconds:.2f} s", flush=True)
        save()
        if run["seconds"] > seconds and step != "finalize":
            raise OutOfTime

    convert.Progress = functools.partial(TimedProgress, record)
    start = Cost.so_far()
    try:
        if code := convert_all():
            return code
        if out.exists():
            run["bytes_on_disk"] = directory_bytes(out)
    except OutOfTime:
        print(f"stopped after {seconds:.0f} s: the stages below are not all")
    save()
    print_table(run)
    return 0


def of_all_layers(
    rows: dict[str, dict[str, float]], steps: dict[str, Cost], layers: int, layers_of_shape: int
) -> dict[str, float]:
    """Returns the seconds of a layer in all stages so far, and of these stages with all layers of the shape.

    A training step counts as that of layers alone, which overestimates rather than underestimates. The first
    one also reads the layers.
    """
    each = sum(row.get("each_layer", 0) for row in rows.values())
    seconds = sum(cost.seconds for cost in steps.values())
    seconds -= sum(cost.seconds for step, cost in steps.items() if step.startswith("codes"))
    each -= rows.get("random codes", {}).get("each_layer", 0)
    if step := rows.get("gains", {}).get("each_step"):
        first = steps["gains 0"]
        done = sum(name.startswith("gains") for name in steps)
        each += (train_gains.STEPS * step + max(first.seconds - first.compile_seconds - step, 0)) / layers
        seconds += (train_gains.STEPS - done) * step
    if not each:
        return {}
    return {
        "each_layer": round(each, 3),
        "of_all_layers": round(seconds + (layers_of_shape - layers) * each, 1),
    }


def print_table(run: dict) -> None:
    """Prints the costs of the stages and of the whole run, and seconds of a layer or a training step."""
    names = Cost._fields
    print(f"{'stage':22}" + "".join(f"{name:>17}" for name in (*names, "each")))
    for stage, row in {**run["stages"], "all": run}.items():
        each = row.get("each_layer", row.get("each_step"))
        cells = [f"{row[name]:17,.1f}" for name in names] + ([] if each is None else [f"{each:17,.2f}"])
        print(f"{stage:22}" + "".join(cells))
    if "of_all_layers" in run:
        print(f"these stages with all layers of the shape: {run['of_all_layers']:,.0f} s")
    print(f"peak memory of the host {run['peak_host_bytes'] / 2**20:,.0f} MiB", end="")
    print(f", device {run['peak_device_bytes'] / 2**20:,.0f} MiB" if run["peak_device_bytes"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shapes = random_model.hf_configs() | {"Llama-135M": LLAMA_135M}
    add = parser.add_argument
    add("--shape", default="Qwen3-8B", choices=shapes, help="published shape (default: Qwen3-8B)")
    add("--config", type=pathlib.Path, metavar="FILE", help="config.json of another shape")
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--vocabulary", type=int, metavar="N", help="shorten the vocabulary to N tokens (default: all)")
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens (default: 32768)")
    add("--seconds", type=float, default=float("inf"), metavar="S", help="stop after S seconds of conversion")
    add(
        "--warm",
        action="store_true",
        help="use the programs that an earlier run compiled (default: compile all)",
    )
    add("--only-gains", action="store_true", help="train level gains of random codes, no other stage")
    add("--calib", type=pathlib.Path, metavar="FILE", help="calibration text (default: the bundled one)")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for both checkpoints")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else shapes[args.shape]
    layers_of_shape = config["num_hidden_layers"]
    config["num_hidden_layers"] = args.layers or layers_of_shape
    config["vocab_size"] = args.vocabulary or config["vocab_size"]

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
        "vocabulary": config["vocab_size"],
        "tokens": args.tokens,
        "model_bytes": directory_bytes(model),
        "runs": [],
    }
    if args.output.exists() and (args.work / "out.partial").exists():
        earlier = json.loads(args.output.read_text())
        if earlier["command"] == report["command"] and "seconds" not in earlier["runs"][-1]:
            report["runs"] = earlier["runs"]
    if args.only_gains:
        texts = [str(args.calib)] if args.calib else []

        def train() -> int:
            with convert.Progress("gains", config["num_hidden_layers"] + 1 + train_gains.STEPS) as progress:
                conversion_gains.train(model, out, args.tokens, texts, lambda note: progress(1, note))
            return 0

        return timed_conversion(train, out, report, args.output, args.seconds)
    command = ["--model", str(model), "--out", str(out), "--tokens", str(args.tokens), "--force"]
    command += ["--calib", str(args.calib)] if args.calib else []
    return timed_conversion(lambda: convert.main(command), out, report, args.output, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
