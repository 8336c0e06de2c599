"""First stage of a conversion: finds the basis, the sensitivities and the vocabulary blocks."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Int

from checkpoints_tools.calibration.sensitivity import (
    ForwardStates,
    output_sensitivities,
    run_forward,
    states_bytes,
)
from checkpoints_tools.convert import vocabulary
from checkpoints_tools.convert.options import PRINCIPAL
from checkpoints_tools.convert.plan import Plan
from checkpoints_tools.convert.principal_basis import RotatedCheckpoint, principal_axes, second_moments
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.layer_spec import HEAD


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """Results of the survey, which all later stages use.

    Attributes:
      weights: Checkpoint whose weights are quantized: the source, or the source in its principal basis.
      sensitivities: Sensitivity of each output of each linear layer, by name (``calibration.sensitivity``).
      vocabulary_blocks: Tokens of each vocabulary block, by name, ascending.
    """

    weights: HFCheckpoint | RotatedCheckpoint
    sensitivities: Mapping[str, Float[np.ndarray, "_"]]
    vocabulary_blocks: Mapping[str, Int[np.ndarray, "_"]]

    def read_vocabulary(self, name: str, outputs: slice) -> Float[np.ndarray | Array, "d n"]:
        """Reads the weights of some outputs of a vocabulary block."""
        return self.weights.read(f"{HEAD}.kernel", self.vocabulary_blocks[name][outputs])


def survey(plan: Plan, directory: Path, on_progress: Callable[[str], None]) -> Survey:
    """Chooses the basis and measures sensitivities on ``plan.survey_windows``.

    Args:
      plan: Plan of the conversion.
      directory: Directory of a temporary file, whose size is that of ``sensitivity.TOKENS`` tokens' states
        before all layers.
      on_progress: Called with a note after each layer of each pass over the model.

    Raises:
      CheckpointError: A weight or a hidden state is NaN or Inf, or the disk has no space for the states.
      OSError: The disk is full.
    """
    source, dtype, axes = plan.source, plan.compute_dtype, None
    size = states_bytes(source.config, plan.survey_windows, dtype)
    with ForwardStates(directory, size) as states:
        if plan.options.basis == PRINCIPAL:
            axes = principal_axes(second_moments(source, plan.survey_windows, dtype, on_progress, states))
        else:
            run_forward(source, plan.survey_windows, dtype, states, on_progress)
        sensitivities = output_sensitivities(source, dtype, states=states, axes=axes, on_progress=on_progress)
    sensitivities[HEAD] = vocabulary.smooth_sensitivities(sensitivities[HEAD])
    names = [name for name in plan.shapes if in_head(name)]
    blocks = dict(zip(names, vocabulary.token_blocks(sensitivities[HEAD]), strict=True))
    sensitivities |= {name: sensitivities[HEAD][tokens] for name, tokens in blocks.items()}
    weights = source if axes is None else RotatedCheckpoint(source, axes, sensitivities)
    return Survey(weights=weights, sensitivities=sensitivities, vocabulary_blocks=blocks)
