"""Runs the stages of a conversion, from the plan to the finished checkpoint.

Memory never holds the whole model. It holds one layer and the hidden states of some windows, and for a while
the embedding or the quantized output projection.
"""

from collections.abc import Callable
from pathlib import Path

from checkpoints_tools.convert import parts, train_gains
from checkpoints_tools.convert.graded_model import GradedModel
from checkpoints_tools.convert.measure_layers import Measurements, measure_layers
from checkpoints_tools.convert.options import TRAINED
from checkpoints_tools.convert.place_thresholds import place_thresholds, write_grading
from checkpoints_tools.convert.plan import Plan
from checkpoints_tools.convert.refit_layers import refit_layers
from checkpoints_tools.convert.survey import Survey, survey
from grinqh_jax.checkpoint import QuantizationConfig, Writer
from pallas_kernels.x64 import without_x64


@without_x64
def convert(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str], None] = lambda note: None,
) -> Path:
    """Converts a checkpoint. The same plan gives the same bytes, also after interruptions.

    A run that resumes an interrupted one keeps its complete parts. It repeats the survey and the
    measurements, whose results are only in memory.

    Args:
      plan: Plan of the conversion (``make_plan``).
      out: Directory to make.
      overwrite: See ``Writer``.
      on_progress: Called ``plan.steps`` times, with a note on the step.

    Returns:
      The absolute path of ``out``.

    Raises:
      CheckpointError: See ``Writer``, ``HFCheckpoint.read`` and ``measure_linear``.
    """
    with Writer(out, fingerprint=plan.fingerprint(), overwrite=overwrite) as writer:
        surveyed = survey(plan, writer.directory, on_progress)
        parts.write_embedding(surveyed.weights, writer)
        on_progress(parts.EMBEDDING)
        measurements = measure_layers(plan, surveyed, writer, on_progress)
        tables = place_thresholds(plan, measurements)
        write_grading(surveyed, measurements, tables, writer)
        refit_layers(plan, surveyed, measurements, tables, writer, on_progress)
        if plan.gains == TRAINED:
            write_trained_gains(plan, surveyed, measurements, writer, on_progress)
        quantization = QuantizationConfig(
            max_bits=plan.options.max_bits, targets=plan.targets, provenance=plan.provenance()
        )
        return writer.finalize(plan.source.hf_config, quantization, plan.source.companions)


def write_trained_gains(
    plan: Plan,
    surveyed: Survey,
    measurements: Measurements,
    writer: Writer,
    on_progress: Callable[[str], None],
) -> None:
    """Trains the level gains of the model that ``writer`` holds, and writes them."""
    if parts.GAINS in writer.parts:
        for step in range(train_gains.STEPS):
            on_progress(f"gains {step}")
        return
    model = GradedModel(
        original=plan.source,
        embedding=surveyed.weights,
        read=writer.read,
        vocabulary_blocks=surveyed.vocabulary_blocks,
        targets=plan.targets,
        compute_dtype=plan.compute_dtype,
    )
    initial = {name: linear.level_gains for name, linear in measurements.linears.items()}
    gains = train_gains.train_gains(model, plan.calibration.windows, initial, on_progress)
    parts.save(writer, parts.GAINS, {f"{name}.gains": array for name, array in gains.items()})
