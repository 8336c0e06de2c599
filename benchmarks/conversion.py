"""Measures the time of a conversion, stage by stage, and its memory, for a model of a published shape.

    python benchmarks/conversion.py --shape Qwen3-8B --work /tmp/qwen3-8b --output FILE
    python benchmarks/conversion.py --shape Qwen3-8B --layers 4 --work /tmp/four --output FILE    a quick look

Writes a Hugging Face checkpoint of that shape, with random weights and the bundled model's tokenizer, to
``WORK/model`` unless it is there. Then runs the real command, ``python -m checkpoints_tools.convert``, in
this process, with a progress bar that records the time of every step.

An interrupted run resumes when started again with the same arguments: it reuses the weights, the converter
resumes, and the report, which is written after every step, gets an entry for each run.

Random weights need the time and memory of trained ones, with one exception: the tokens of the bundled model's
tokenizer lie in few ranges of a large vocabulary, and only those ranges of the embedding are read.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import jax
import random_checkpoint

from checkpoints_tools.convert import command as convert
from checkpoints_tools.convert.sizes import directory_bytes
from grinqh_jax.benchmarking import random_model
from grinqh_jax.cli.progress import Progress
from grinqh_jax.memory import peak_host_memory

STAGES = {
    "axes of layers": "second moments",
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
before: the eigenvectors count for ``forward``, the head's sensitivities for ``backward``, the placing of
thresholds for ``refit``."""

WARM_UP = 2
"""Number of steps of a stage that may compile. The others give the seconds of a layer or a training step."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tensorstore", "safetensors")


class TimedProgress(Progress):
    """The converter's progress bar, which calls ``record`` with the note and the seconds of every step."""

    def __init__(self, record: Callable[[str, float], None], description: str, total: int, unit: str):
        super().__init__(description, total, unit)
        self._record = record
        self._last = time.monotonic()

    def __call__(self, units: int, note: str = "") -> None:
        self._step(note)
        super().__call__(units, note)

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if exc_info[0] is None:
            self._step("finalize")

    def _step(self, note: str) -> None:
        now = time.monotonic()
        self._record(note, now - self._last)
        self._last = now


def stages(steps: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns the seconds of each stage, of its first step, and of a layer if there are enough steps."""
    times: dict[str, list[float]] = {}
    for step, seconds in steps.items():
        stage = next(stage for prefix, stage in STAGES.items() if step.startswith(prefix))
        times.setdefault(stage, []).append(seconds)
    rows = {stage: {"seconds": sum(seconds), "first": seconds[0]} for stage, seconds in times.items()}
    for stage, seconds in times.items():
        if later := seconds[WARM_UP:]:
            rows[stage]["each_step" if stage == "gains" else "each_layer"] = sum(later) / len(later)
    return {stage: {name: round(s, 3) for name, s in row.items()} for stage, row in rows.items()}


def timed_conversion(command: list[str], out: pathlib.Path, report: dict, output: pathlib.Path) -> int:
    """Runs the converter, adds a run to the report, and returns the exit code."""

    def save() -> None:
        writing = output.with_name(output.name + ".writing")
        writing.write_text(json.dumps(report, indent=1) + "\n")
        writing.rename(output)

    written = {step for run in report["runs"] for step in run["steps"] if step.startswith("refit layers.")}
    steps: dict[str, float] = {}
    run = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "steps": steps}
    report["runs"].append(run)

    def record(step: str, seconds: float) -> None:
        if step in written:
            return
        steps[step] = round(seconds, 3)
        memory = jax.local_devices()[0].memory_stats() or {}
        run["stages"] = stages(steps)
        run["peak_host_bytes"] = peak_host_memory()
        run["peak_device_bytes"] = memory.get("peak_bytes_in_use")
        print(f"[{time.monotonic() - start:5.0f}s] {step}: {seconds:.2f} s", flush=True)
        save()

    convert.Progress = functools.partial(TimedProgress, record)
    start = time.monotonic()
    if code := convert.main(command):
        return code
    run["seconds"] = round(time.monotonic() - start, 1)
    run["bytes_on_disk"] = directory_bytes(out)
    each = sum(row.get("each_layer", 0) for row in run["stages"].values())
    if each and not written:
        # Attributes all of a training step to the layers, which overestimates rather than underestimates.
        training = sum(step.startswith("gains") for step in steps)
        each += training * run["stages"].get("gains", {}).get("each_step", 0) / report["layers"]
        missing = report["layers_of_shape"] - report["layers"]
        run |= {"each_layer": round(each, 3), "of_all_layers": round(run["seconds"] + missing * each, 1)}
    save()
    print(json.dumps(run | {"steps": len(steps)}, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shapes = random_model.hf_configs()
    add = parser.add_argument
    add("--shape", default="Qwen3-8B", choices=shapes, help="published shape (default: Qwen3-8B)")
    add("--config", type=pathlib.Path, metavar="FILE", help="config.json of another shape")
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--tokens", type=int, default=32768, metavar="N", help="calibration tokens (default: 32768)")
    add("--calib", type=pathlib.Path, metavar="FILE", help="calibration text (default: the bundled one)")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for both checkpoints")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else shapes[args.shape]
    layers_of_shape = config["num_hidden_layers"]
    config["num_hidden_layers"] = args.layers or layers_of_shape

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
