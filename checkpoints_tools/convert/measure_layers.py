"""Second stage of a conversion: measures inputs and level errors of every linear layer, layer by layer.

If a projection is not refitted, this stage also packs and writes its codes, so that each weight is packed
once. If it is refitted, this stage only measures: its weights change later, depending on the thresholds and
on the codes of all layers before it, and ``refit_layers`` packs them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.calibration import statistics
from checkpoints_tools.calibration.statistics import LinearStatistics
from checkpoints_tools.convert import parts
from checkpoints_tools.convert.options import NONE, TRAINED
from checkpoints_tools.convert.plan import Plan
from checkpoints_tools.convert.quantize_linear import (
    ReadOutputs,
    Rounding,
    fit_gains,
    measure_linear,
    quantize_linear,
)
from checkpoints_tools.convert.survey import Survey
from checkpoints_tools.quantizers import QUANTIZERS, LevelFit
from checkpoints_tools.source.layer import dense_layer, each_expert, embed, read_experts, read_layer
from checkpoints_tools.source.passes import each_group
from grinqh_jax.checkpoint import Writer
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder_layer import RMSNorm
from grinqh_jax.model.layer_spec import HEAD, Attention


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LinearMeasurement:
    """Measurement of one linear layer, before its weights are refitted.

    Attributes:
      inputs: Statistics of the inputs.
      errors: Errors of levels ``0..P``, weighted by the sensitivities, float64.
      level_gains: Fitted level gains, float32; all 1 where none are fitted.
    """

    inputs: LinearStatistics
    errors: Float[np.ndarray, "p1"]
    level_gains: Float[np.ndarray, "p"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """Measurements of the whole model.

    Attributes:
      linears: Measurement of each linear layer, by name.
      vectors: Parameters that are not quantized, by name in the state tree: norm scales
        (``layers.0.input_norm.scale``), biases and routers.
    """

    linears: Mapping[str, LinearMeasurement]
    vectors: Mapping[str, Float[np.ndarray, "..."]]


def measure_layers(
    plan: Plan, survey: Survey, writer: Writer, on_progress: Callable[[str], None]
) -> Measurements:
    """Runs the threshold windows through the model and measures every linear layer.

    After an interruption all layers are measured again, but codes that were written are not packed again.

    Args:
      plan: Plan of the conversion.
      survey: Result of the survey.
      writer: Receives the codes of the weights that are not refitted, one part for each layer.
      on_progress: Called with a note after each layer, and after the output projection.

    Raises:
      CheckpointError: See ``measure_linear`` and ``Writer.save_part``.
    """
    weights = survey.weights
    hidden = embed(weights, plan.threshold_windows, plan.compute_dtype)
    linears: dict[str, LinearMeasurement] = {}
    vectors: dict[str, Float[np.ndarray, "..."]] = {}
    config = plan.source.config
    for i, spec in enumerate(config.layers):
        kernels, layer_vectors = read_layer(weights, i, experts=False)
        vectors |= {f"layers.{i}.{name}": vector for name, vector in layer_vectors.items()}
        layer = dense_layer(weights, i, kernels, layer_vectors, plan.compute_dtype)
        stacks: dict[str, Array] = {}
        groups = _kept_if_whole(each_group(weights, i, layer), stacks, config.num_experts)
        inputs = statistics.through_layer(layer, hidden, groups)
        del layer, groups  # Frees the dense copy before codes are made.
        leaves: dict[str, np.ndarray] = {}
        for projection in spec.projections:
            name = f"layers.{i}.{projection.name}"
            of_projection = rounding(plan, survey, name, inputs[projection.name])
            if projection.of_experts:
                stack = stacks.pop(projection.name, None)
                experts = read_experts(weights, f"{name}.kernel") if stack is None else each_expert(stack)
                write = name not in writer.parts
                linears[name], codes = _measure_experts(of_projection, experts, plan, write=write)
                parts.save(writer, name, codes)
                del stack, experts, codes  # Frees its weights before the next projection is packed.
                continue
            write = projection.name not in plan.refit and f"layers.{i}" not in writer.parts
            read_outputs = functools.partial(_columns, kernels.pop(projection.name))
            linears[name], codes = _measure(of_projection, read_outputs, plan, write=write)
            del read_outputs
            leaves |= codes
        parts.save(writer, f"layers.{i}", leaves)
        on_progress(f"measure layers.{i}")
    final_scale = f"{config.final_norm.name}.scale"
    vectors[final_scale] = np.asarray(weights.read(final_scale))
    norm = RMSNorm(jnp.asarray(vectors[final_scale]), config.rms_norm_eps)
    head_inputs, leaves = statistics.of_head(norm, hidden), {}
    for name in survey.vocabulary_blocks:
        linears[name], codes = _measure(
            rounding(plan, survey, name, head_inputs),
            functools.partial(survey.read_vocabulary, name),
            plan,
            write=HEAD not in plan.refit and HEAD not in writer.parts,
        )
        leaves |= codes
    parts.save(writer, HEAD, leaves)
    on_progress(f"measure {HEAD}")
    return Measurements(linears=linears, vectors=vectors)


def _kept_if_whole(
    groups: Iterable[dict[str, Array]], stacks: dict[str, Array], num_experts: int
) -> Iterator[None]:
    """Copies kernels of experts to ``stacks`` if one group has them all. Others are read again one by one."""
    for kernels in groups:
        stacks |= {name: kernel for name, kernel in kernels.items() if len(kernel) == num_experts}
        yield


def _columns(kernel: np.ndarray | Array, outputs: slice) -> np.ndarray | Array:
    return kernel[:, outputs]


def rounding(plan: Plan, survey: Survey, name: str, inputs: LinearStatistics) -> Rounding:
    """Returns the ``Rounding`` of the linear layer called ``name``."""
    return Rounding(
        name=name,
        shape=plan.shapes[name],
        inputs=inputs,
        sensitivities=survey.sensitivities[name],
        quantizer=QUANTIZERS[plan.options.quantizer],
        max_bits=plan.options.max_bits,
    )


def fitted_gains(plan: Plan, name: str, fit: LevelFit) -> Float[np.ndarray, "p"]:
    """Returns the level gains of a linear layer: least squares where they help, 1 elsewhere."""
    fitted = plan.gains != NONE and gains_help(plan.source.config, name)
    return fit_gains(fit) if fitted else np.ones(len(fit.slopes), np.float32)


def gains_help(config: ModelConfig, name: str) -> bool:
    """Whether a linear layer gets least-squares gains: projections in front of attention, and the head.

    In the other layers such gains increase the divergence of the 32M model of ``docs/quality.md``. Training
    starts from these gains.
    """
    if in_head(name):
        return True
    _, i, projection = name.split(".")
    block = config.layers[int(i)].block_of(projection)
    return isinstance(block.mixer, Attention) and projection == block.reads.name


def stored_codes(
    plan: Plan, name: str, codes: Mapping[str, np.ndarray], level_gains: Float[np.ndarray, "p"]
) -> dict[str, np.ndarray]:
    """Returns the leaves of a part, by dotted name: codes, and level gains unless they are trained later."""
    leaves = dict(codes) if plan.gains == TRAINED else {**codes, "gains": level_gains}
    return {f"{name}.{leaf}": array for leaf, array in leaves.items()}


def _measure_experts(
    rounding: Rounding, kernels: Iterable[np.ndarray | Array], plan: Plan, *, write: bool
) -> tuple[LinearMeasurement, dict[str, np.ndarray]]:
    """Measures the linear layers of experts one after another, as ``_measure`` does.

    The fit of the levels is the mean over all experts, whether calibration chose them often or never.
    """
    count = plan.source.config.num_experts
    leaves: dict[str, np.ndarray] = {}
    fits = []
    for expert, kernel in enumerate(kernels):
        one = dataclasses.replace(rounding, name=f"{rounding.name}[{expert}]")
        read_outputs = functools.partial(_columns, kernel)
        if not write:
            fits.append(measure_linear(one, read_outputs))
            continue
        codes, fit = quantize_linear(one, read_outputs)
        fits.append(fit)
        for leaf, array in codes.items():
            leaves.setdefault(leaf, np.empty((count, *array.shape), array.dtype))[expert] = array
    mean = LevelFit(*(np.mean(values, axis=0) for values in zip(*fits, strict=True)))
    return _measurement(rounding, mean, leaves, plan)


def _measure(
    rounding: Rounding, read_outputs: ReadOutputs, plan: Plan, *, write: bool
) -> tuple[LinearMeasurement, dict[str, np.ndarray]]:
    """Measures a layer. If ``write``, also packs it and returns the leaves of its codes, else no leaves."""
    if write:
        codes, fit = quantize_linear(rounding, read_outputs)
    else:
        codes, fit = {}, measure_linear(rounding, read_outputs)
    return _measurement(rounding, fit, codes, plan)


def _measurement(
    rounding: Rounding, fit: LevelFit, codes: Mapping[str, np.ndarray], plan: Plan
) -> tuple[LinearMeasurement, dict[str, np.ndarray]]:
    """Returns the measurement of a layer, and the leaves of its codes if there are any."""
    level_gains = fitted_gains(plan, rounding.name, fit)
    measurement = LinearMeasurement(
        inputs=rounding.inputs, errors=np.asarray(fit.errors), level_gains=level_gains
    )
    return measurement, stored_codes(plan, rounding.name, codes, level_gains) if codes else {}
