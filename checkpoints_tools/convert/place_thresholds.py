"""Third stage of a conversion: places the thresholds of all linear layers, which share the bits."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from checkpoints_tools.calibration.allocation import GradedCosts, smooth_sensitivities, threshold_tables
from checkpoints_tools.convert import parts, vocabulary
from checkpoints_tools.convert.measure_layers import Measurements
from checkpoints_tools.convert.options import SENSITIVITY
from checkpoints_tools.convert.plan import Plan
from checkpoints_tools.convert.survey import Survey
from grinqh_jax.checkpoint import Writer
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import stored_dtypes
from grinqh_jax.model.weight_counts import weights_read


def place_thresholds(plan: Plan, measurements: Measurements) -> dict[str, Float[np.ndarray, "targets p"]]:
    """Places thresholds that read each target's mean bits of the measured inputs.

    The mean is over the weights that a token reads: of a mixture, those of the chosen experts.

    Args:
      plan: Plan of the conversion. If bits are split by sensitivity, all layers together read each target's
        mean; otherwise each layer reads it.
      measurements: Inputs and level errors of all linear layers.

    Returns:
      Table of each linear layer, by name, float32 (see ``threshold_tables``).
    """
    weights = weights_read(plan.source.config)
    costs = {
        name: GradedCosts(linear.inputs.counts, linear.errors, weights[name])
        for name, linear in measurements.linears.items()
    }
    if plan.options.split == SENSITIVITY:
        return threshold_tables(smooth_sensitivities(costs), plan.targets)
    tables: dict[str, Float[np.ndarray, "targets p"]] = {}
    for name, cost in costs.items():
        tables |= threshold_tables({name: cost}, plan.targets)
    return tables


def write_grading(
    survey: Survey,
    measurements: Measurements,
    tables: Mapping[str, Float[np.ndarray, "targets p"]],
    writer: Writer,
) -> None:
    """Writes thresholds, ranges of activations, norms, and the order of the tokens."""
    leaves = {f"{name}.thresholds": table for name, table in tables.items()}
    for name, linear in measurements.linears.items():
        leaves[f"{name}.max_activation"] = np.asarray(linear.inputs.max_activation, np.float32)
    dtypes = stored_dtypes(survey.weights.config)
    for name, vector in measurements.vectors.items():
        leaves[name] = np.asarray(vector).astype(dtypes[name])
    leaves[f"{HEAD}.columns"] = vocabulary.token_to_output(list(survey.vocabulary_blocks.values()))
    parts.save(writer, parts.GRADING, leaves)
