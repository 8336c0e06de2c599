"""Fourth stage of a conversion: refits weights to their graded inputs, quantizes and writes them.

Each projection is fitted to the inputs that the quantized projections before it produce, so the layers are
refitted in order. One layer is in memory. ``refitted_codes`` writes the refitted weights into codes and
bounds the change at full precision.
"""

import functools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.convert import parts
from checkpoints_tools.convert.coded_experts import CodedExperts
from checkpoints_tools.convert.coded_linear import CodedLinear
from checkpoints_tools.convert.measure_layers import Measurements, fitted_gains, rounding, stored_codes
from checkpoints_tools.convert.plan import Plan
from checkpoints_tools.convert.quantize_linear import Refit, Rounding, quantize_linear
from checkpoints_tools.convert.refit import RefitStates
from checkpoints_tools.convert.refitted_codes import bounded
from checkpoints_tools.convert.survey import Survey
from checkpoints_tools.quantizers import RoundedWeight
from checkpoints_tools.source.layer import dense_layer, embed, read_layer
from checkpoints_tools.source.passes import each_group
from grinqh_jax.checkpoint import Writer
from grinqh_jax.model.decoder_layer import RMSNorm
from grinqh_jax.model.experts import GradedExperts, build_experts
from grinqh_jax.model.layer_spec import HEAD, GatedExperts
from grinqh_jax.model.linear import GradedLinear, build_linear
from pallas_kernels.weight import num_planes

Tables = Mapping[str, Float[np.ndarray, "targets p"]]
"""Threshold table of each linear layer, by name."""


def refit_layers(
    plan: Plan,
    survey: Survey,
    measurements: Measurements,
    tables: Tables,
    writer: Writer,
    on_progress: Callable[[str], None],
) -> None:
    """Refits, quantizes and writes the projections of ``plan.refit``. Returns at once if there are none.

    The residual streams after each layer are saved with its part. After an interruption the stage resumes
    after the last layer that was written.

    Args:
      plan: Plan of the conversion.
      survey: Result of the survey.
      measurements: Statistics of the inputs; level gains of the projections that are not refitted.
      tables: Threshold tables.
      writer: Receives one part for each layer. It already holds the codes that are not refitted.
      on_progress: Called with a note after each layer, and after the output projection.

    Raises:
      CheckpointError: See ``measure_linear`` and ``Writer.save_part``.
    """
    if not plan.refit:
        return
    hidden = embed(survey.weights, plan.refit_windows, plan.compute_dtype)
    other = embed(survey.weights, plan.other_windows, plan.compute_dtype)
    states = RefitStates(hidden, other, tables, plan.targets, plan.source.config.layers)
    del hidden, other
    for i in range(plan.source.config.num_layers):
        part = parts.refitted(f"layers.{i}")
        if part not in writer.parts:
            leaves = _refit_layer(plan, survey, measurements, tables, writer, states, i)
            parts.save(writer, part, leaves, resume_state=states.streams)
        elif (streams := writer.resume_state(part)) is not None:
            states.streams = streams
        on_progress(f"refit layers.{i}")
    if HEAD in plan.refit and parts.refitted(HEAD) not in writer.parts:
        leaves = _refit_head(plan, survey, measurements, states)
        parts.save(writer, parts.refitted(HEAD), leaves)
    on_progress(f"refit {HEAD}")


def _refit_layer(
    plan: Plan,
    survey: Survey,
    measurements: Measurements,
    tables: Tables,
    writer: Writer,
    states: RefitStates,
    i: int,
) -> dict[str, np.ndarray]:
    """Moves the windows through layer ``i`` and returns the leaves of its refitted projections.

    Experts, which take most of the memory, are read when the windows have arrived at them, in groups.
    """
    kernels, vectors = read_layer(survey.weights, i, experts=False)
    layer = dense_layer(survey.weights, i, kernels, vectors, plan.compute_dtype)
    norm = layer.spec.blocks[0].norm
    states.apply_norm(None if norm is None else getattr(layer, norm.name))
    leaves: dict[str, np.ndarray] = {}
    for block in layer.spec.blocks:
        if isinstance(block.mixer, GatedExperts):
            names = block.reads.name, block.writes.name
            gains = {name: measurements.linears[f"layers.{i}.{name}"].level_gains for name in names}
            groups = each_group(survey.weights, i, layer)

            def read_experts(projection: str) -> CodedExperts:
                bias = vectors.get(f"{projection}.bias")
                return _coded_experts(plan, writer, tables, f"layers.{i}.{projection}", bias)

            states.advance_mixture(f"layers.{i}.", layer, block, read_experts, gains, groups)
            continue
        for projection in (block.reads.name, block.writes.name):
            name = f"layers.{i}.{projection}"
            measurement = measurements.linears[name]
            if projection in plan.refit:

                def read_outputs(outputs: slice, projection=projection) -> np.ndarray | Array:
                    return kernels[projection][:, outputs]

                layer_rounding = rounding(plan, survey, name, measurement.inputs)
                codes, fit = quantize_linear(layer_rounding, read_outputs, _refit(states, layer_rounding))
                level_gains = fitted_gains(plan, name, fit)
                leaves |= stored_codes(plan, name, codes, level_gains)
            else:
                codes, level_gains = writer.read(name), measurement.level_gains
            del kernels[projection]  # Frees its weights before the next projection is refitted.
            tree = _tree(codes, tables[name], level_gains, vectors.get(f"{projection}.bias"))
            linear = build_linear(tree, plan.shapes[name], plan.compute_dtype)
            assert isinstance(linear, GradedLinear), "the tree has planes"
            states.advance(name, layer, CodedLinear.of_planes(linear), level_gains)
    return leaves


def _tree(
    codes: Mapping[str, np.ndarray | Array],
    table: Float[np.ndarray, "targets p"],
    level_gains: Float[np.ndarray, "p"],
    bias: np.ndarray | None,
) -> dict[str, Array]:
    """Returns the arrays of a graded linear layer; the largest activation does not matter here."""
    tree = {
        "planes": jnp.asarray(codes["planes"]),
        "scales": jnp.asarray(codes["scales"]),
        "thresholds": jnp.asarray(table),
        "gains": jnp.asarray(level_gains),
        "max_activation": jnp.zeros(()),
    }
    return tree if bias is None else {**tree, "bias": jnp.asarray(bias, jnp.float32)}


def _coded_experts(
    plan: Plan, writer: Writer, tables: Tables, name: str, bias: np.ndarray | None
) -> CodedExperts:
    """Reads the codes of experts, which are not refitted."""
    unit_gains = np.ones(tables[name].shape[1], np.float32)
    experts = build_experts(_tree(writer.read(name), tables[name], unit_gains, bias), plan.shapes[name])
    assert isinstance(experts, GradedExperts), "the tree has planes"
    return CodedExperts.of_planes(experts)


def _refit(states: RefitStates, rounding: Rounding) -> Refit:
    """Returns the function that refits the outputs of the current projection after rounding."""

    def refit(
        w: Float[Array, "k n"], rounded: RoundedWeight, outputs: slice
    ) -> tuple[Float[Array, "k n"], RoundedWeight]:
        return bounded(
            w,
            states.fitted(rounding.name, w, outputs),
            rounded,
            states.other_inputs,
            jnp.asarray(rounding.sensitivities[outputs], jnp.float32),
            num_planes=num_planes(rounding.max_bits),
        )

    return refit


def _refit_head(
    plan: Plan, survey: Survey, measurements: Measurements, states: RefitStates
) -> dict[str, np.ndarray]:
    """Returns the leaves of the refitted vocabulary blocks."""
    scale = jnp.asarray(measurements.vectors[f"{plan.source.config.final_norm.name}.scale"])
    states.apply_norm(RMSNorm(scale, plan.source.config.rms_norm_eps))
    leaves: dict[str, np.ndarray] = {}
    for name in survey.vocabulary_blocks:
        block_rounding = rounding(plan, survey, name, measurements.linears[name].inputs)
        read_outputs = functools.partial(survey.read_vocabulary, name)
        codes, fit = quantize_linear(block_rounding, read_outputs, _refit(states, block_rounding))
        leaves |= stored_codes(plan, name, codes, fitted_gains(plan, name, fit))
    return leaves
