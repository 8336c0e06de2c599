"""The plan of a conversion: all that follows from the options, the shapes and the calibration text."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from checkpoints_tools.calibration import sensitivity
from checkpoints_tools.calibration.allocation import target_grid
from checkpoints_tools.calibration.text import Calibration, split_windows
from checkpoints_tools.convert import refit_tokens, train_gains
from checkpoints_tools.convert.options import FITTED, ORIGINAL, PRINCIPAL, TRAINED, Options
from checkpoints_tools.convert.sizes import bits_per_weight_stored
from grinqh_jax import __version__
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.decoder import linear_shapes
from grinqh_jax.model.options import rotation_obstacle
from pallas_kernels.layout import DIGIT_BITS

PARTS_VERSION = 5
"""Version of the division of a checkpoint into parts. It is part of the fingerprint, so a conversion never
resumes with parts of another version."""


class Stage(NamedTuple):
    """One stage of a conversion.

    Attributes:
      name: First word of the notes on its steps.
      steps: Number of steps.
      work: Approximate time of a step. The unit is the time of a token in the forward pass of a layer; the
        factors were measured on two CPU cores with 135 million parameters.
    """

    name: str
    steps: int
    work: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything that is known before the conversion reads a weight.

    Attributes:
      source: Checkpoint that is converted.
      calibration: Calibration text.
      options: Options that the caller chose.
      survey_windows: Windows that choose the basis and measure sensitivities, ``[s, t]``.
      threshold_windows: Windows that thresholds are placed on. They differ from the survey windows because a
        basis suits the text that it was computed from better than other text; thresholds placed on that text
        would read too many bits of other text.
      refit_windows: Windows that weights are refitted to, the first of the survey windows.
      other_windows: Windows of another kind of text, which the refitted weights are checked on.
      gains: One of ``GAINS``: the source of the level gains.
      refit: Names of the projections that are refitted in every layer, and ``HEAD`` if the output projection
        is. Empty without ``options.refit``.
      not_done: One line for each option that the conversion does not carry out, with the reason.
      compute_dtype: Dtype of hidden states and products: float32 on a CPU, which emulates bfloat16 slowly,
        bfloat16 elsewhere.
    """

    source: HFCheckpoint
    calibration: Calibration
    options: Options
    survey_windows: Int32[np.ndarray, "s t"]
    threshold_windows: Int32[np.ndarray, "s2 t"]
    refit_windows: Int32[np.ndarray, "s3 t"]
    other_windows: Int32[np.ndarray, "s4 t4"]
    gains: str
    refit: tuple[str, ...]
    not_done: tuple[str, ...]
    compute_dtype: Any

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(in_features, out_features)`` of all linear layers, by name."""
        return linear_shapes(self.source.config)

    @property
    def targets(self) -> tuple[float, ...]:
        """Mean bits of the rows of the threshold tables."""
        return target_grid(self.options.max_bits)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of the conversion, in order."""
        layers, head = self.source.config.num_layers, 1
        tokens = self.survey_windows.size
        stages = [
            Stage("forward", layers, tokens),
            Stage("backward", layers, 4 * min(tokens, sensitivity.TOKENS)),
            Stage("embed", 1, 0),
            Stage("measure", layers + head, 2 * self.threshold_windows.size),
        ]
        if self.refit:
            stages.append(Stage("refit", layers + head, 9 * self.refit_windows.size))
        if self.gains == TRAINED:
            step = train_gains.step_tokens(self.calibration.windows, self.targets)
            stages.append(Stage("gains", train_gains.STEPS, 7 * layers * step))
        return tuple(stages)

    @property
    def steps(self) -> int:
        """Number of times that the conversion calls ``on_progress``."""
        return sum(stage.steps for stage in self.stages)

    @property
    def work(self) -> float:
        """Work of all steps (see ``Stage``)."""
        return sum(stage.steps * stage.work for stage in self.stages)

    def work_of(self, note: str) -> float:
        """Returns the work of the step that a note of ``on_progress`` names."""
        return next(stage.work for stage in self.stages if stage.name == note.split()[0])

    def fingerprint(self) -> str:
        """Returns a string that is equal for two conversions whose parts are interchangeable.

        It covers the options, the calibration tokens, the size and time of every source file, and the
        compute dtype, but not the source's path: a moved source is the same. See ``Writer``.
        """
        files = sorted(set(self.source.files.values()))
        state = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        dtype = str(jnp.dtype(self.compute_dtype))
        provenance = self.provenance()
        del provenance["source"]
        facts = [PARTS_VERSION, provenance, self.source.hf_config, state, dtype]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Returns the record in ``quantization_config`` of how the checkpoint is made."""
        windows = self.calibration.windows
        return {
            "converter": f"grinqh-jax {__version__}",
            "source": str(self.source.directory.resolve()),
            "quantizer": self.options.quantizer,
            "basis": self.options.basis,
            "split": self.options.split,
            "gains": self.gains,
            "refit": list(self.refit),
            "bits_per_weight_stored": round(
                bits_per_weight_stored(self.source.config, self.options.max_bits), 4
            ),
            "calibration": {
                "text": self.calibration.name,
                "windows": len(windows),
                "window_tokens": windows.shape[1],
                "tokens_sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
            },
        }


def make_plan(source: HFCheckpoint, calibration: Calibration, options: Options) -> Plan:
    """Makes the plan of a conversion.

    Args:
      source: Checkpoint to convert.
      calibration: Calibration text.
      options: Options that the caller chose.
    """
    survey_windows, threshold_windows = split_windows(calibration.windows)
    compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    widths = refit_tokens.input_widths(source.config)
    is_mixture = source.config.num_experts > 0
    state_bytes = refit_tokens.MIXTURE_STATE_BYTES if is_mixture else refit_tokens.STATE_BYTES
    itemsize = jnp.dtype(compute_dtype).itemsize
    refit_windows = refit_tokens.fitting_windows(survey_windows, widths, itemsize, state_bytes)
    refit: tuple[str, ...] = ()
    not_done: list[str] = []
    if options.refit:
        if is_mixture:
            not_done.append("weights of experts were not refitted: each gets few of the calibration tokens")
        refit = tuple(refit_tokens.refitted_projections(refit_windows, widths))
        if shortage := refit_tokens.shortage(refit_windows, widths):
            not_done.append(shortage)
    if options.basis == PRINCIPAL and (obstacle := rotation_obstacle(source.config)):
        options = dataclasses.replace(options, basis=ORIGINAL)
        not_done.append(f"the basis is the original one, no principal axes are possible: {obstacle}")
    gains, several_levels = options.gains, options.max_bits > DIGIT_BITS
    if gains == TRAINED and not (several_levels and calibration.windows.size >= train_gains.LEAST_TOKENS):
        gains = FITTED
        if several_levels:
            not_done.append(
                f"level gains were fitted, not trained: {calibration.windows.size:,} calibration tokens are"
                f" too few (training needs {train_gains.LEAST_TOKENS:,})"
            )
    return Plan(
        source=source,
        calibration=calibration,
        options=options,
        survey_windows=survey_windows,
        threshold_windows=threshold_windows,
        refit_windows=refit_windows,
        other_windows=calibration.other,
        gains=gains,
        refit=refit,
        not_done=tuple(not_done),
        compute_dtype=compute_dtype,
    )
