"""The last stage of a conversion alone: trains level gains for random codes (``conversion.py --only-gains``).

The stages before it take most of a conversion's time, and its own time does not depend on the values of codes
and thresholds. The codes are written and read back as in a conversion.
"""

import math
import pathlib
import uuid
from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import driver, parts, vocabulary
from checkpoints_tools.convert.measure_layers import LinearMeasurement, Measurements
from checkpoints_tools.convert.options import TRAINED, Options
from checkpoints_tools.convert.plan import Plan, make_plan
from checkpoints_tools.convert.survey import Survey
from checkpoints_tools.source.open import open_source
from grinqh_jax.checkpoint import Writer
from grinqh_jax.memory import give_back_large_arrays
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.decoder import abstract_tree
from grinqh_jax.model.layer_spec import HEAD
from pallas_kernels.layout import GROUP

THRESHOLDS = 0.1, 0.4, 1.0, 2.0
"""Thresholds of all linear layers."""


def train(
    model: pathlib.Path, out: pathlib.Path, tokens: int, texts: list[str], on_progress: Callable[[str], None]
) -> None:
    """Writes random codes for a Hugging Face checkpoint and trains their level gains.

    Args:
      model: Directory of the checkpoint.
      out: Directory as of a conversion. ``{out}.partial`` keeps the codes.
      tokens: Number of calibration tokens.
      texts: Calibration texts.
      on_progress: Called with a note after the codes of each part are written, and after each training step.
    """
    give_back_large_arrays()
    source = open_source(model)
    plan = make_plan(source, read_calibration(source, texts, tokens), Options())
    if plan.gains != TRAINED:
        raise SystemExit("; ".join(plan.not_done))
    names = [name for name in plan.shapes if in_head(name)]
    blocks = vocabulary.token_blocks(np.linspace(1, 0, source.config.vocab_size))
    survey = Survey(weights=source, sensitivities={}, vocabulary_blocks=dict(zip(names, blocks, strict=True)))
    measurement = LinearMeasurement(
        inputs=LinearStatistics.empty(), errors=np.zeros(0), level_gains=np.ones(len(THRESHOLDS), np.float32)
    )
    measurements = Measurements(linears=dict.fromkeys(plan.shapes, measurement), vectors={})
    with Writer(out, fingerprint=uuid.uuid4().hex, overwrite=True) as writer:
        write_random_codes(plan, writer, on_progress)
        driver.write_trained_gains(plan, survey, measurements, writer, on_progress)


def write_random_codes(plan: Plan, writer: Writer, on_progress: Callable[[str], None]) -> None:
    """Writes everything that the training reads, one part for each layer and one for all else."""
    config = plan.source.config
    leaves = flatten_dict(abstract_tree(config, plan.options.max_bits, len(plan.targets)), sep=".")
    in_part: dict[str, list[str]] = {}
    for leaf in leaves:
        part = ".".join(leaf.split(".")[:2]) if leaf.startswith("layers.") else HEAD
        if not leaf.endswith((".gains", ".embedding", ".columns")):
            in_part.setdefault(part, []).append(leaf)
    rng = np.random.default_rng(0)
    for part, names in in_part.items():
        parts.save(writer, part, {name: _random(name, leaves[name], rng) for name in names})
        on_progress(f"codes {part}")


def _random(name: str, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    shape, dtype, kind = leaf.shape, np.dtype(leaf.dtype), name.rpartition(".")[2]
    if kind == "planes":
        return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    if kind == "scales":  # keeps the size of activations: uniform codes on (-2, 2) have a variance of 4 / 3
        return np.full(shape, (shape[-2] * GROUP * 4 / 3) ** -0.5, dtype)
    if kind == "kernel":
        return (rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5).astype(dtype)
    if kind == "thresholds":
        return np.broadcast_to(np.asarray(THRESHOLDS[: shape[-1]], dtype), shape).copy()
    return np.ones(shape, dtype) if kind in ("scale", "max_activation") else np.zeros(shape, dtype)
