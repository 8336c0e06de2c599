"""The conversion: a Hugging Face checkpoint becomes a GRINQH checkpoint, one decoder layer at a time.

Memory holds one layer, the hidden states of the calibration windows, and, at the two ends, the
embedding or the quantized output projection; never the model.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Int, Int32

from checkpoints_tools.calibration import statistics
from checkpoints_tools.calibration.allocation import (
    GradedCosts,
    smooth_sensitivities,
    target_grid,
    threshold_tables,
)
from checkpoints_tools.calibration.sensitivity import output_sensitivities
from checkpoints_tools.calibration.text import windows_of_two_kinds
from checkpoints_tools.convert import trained_gains, vocabulary
from checkpoints_tools.convert.graded_divergence import GradedParts
from checkpoints_tools.convert.principal_basis import RotatedCheckpoint, principal_axes, second_moments
from checkpoints_tools.convert.quantize_linear import quantize_linear
from checkpoints_tools.convert.refit import Refit
from checkpoints_tools.convert.refit_tokens import fitting_windows, input_widths, refitted_parts, shortage
from checkpoints_tools.convert.sizes import bits_per_weight_stored
from checkpoints_tools.quantizers import QUANTIZERS
from checkpoints_tools.source.layer import BLOCK_VALUES, dense_layer, embed, read_layer
from grinqh_jax import __version__
from grinqh_jax.checkpoint import QuantizationConfig, Writer
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.model.apply import HEAD, of_head
from grinqh_jax.model.decoder import LAYER_LINEARS, RMSNorm, linear_shapes
from grinqh_jax.model.linear import linear_of
from pallas_kernels.layout import DIGIT_BITS

PRINCIPAL, ORIGINAL = BASES = ("principal", "original")
"""See ``Conversion``."""

SENSITIVITY, UNIFORM = SPLITS = ("sensitivity", "uniform")
"""Likewise."""

TRAINED, FITTED, NONE = GAINS = ("trained", "fitted", "none")
"""Likewise."""

GAINED = (".qkv",)
"""Linear layers whose levels get least-squares gains, beside the output projection. In the others such gains
make the 32m model of ``docs/quality.md`` diverge more. Training begins with these."""

TRAINED_GAINS = "gains"
"""The part of a checkpoint that holds them."""

STORED_DTYPE = jnp.bfloat16
"""Of norms and embeddings in the checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that thresholds are calibrated on.

    Attributes:
      windows: token ids ``[windows, tokens of a window]``.
      name: of the text, for the checkpoint's provenance.
    """

    windows: Int32[np.ndarray, "s t"]
    name: str


class Conversion:
    """Converts an opened checkpoint. The same arguments give the same bytes, interrupted or not.

    Args:
      source: the checkpoint.
      calibration: its text.
      max_bits: bits of the stored codes: 2, 4, 6 or 8.
      quantizer: a key of ``QUANTIZERS``.
      basis: one of ``BASES``: turn the residual stream onto its principal axes first, or leave it.
      split: one of ``SPLITS``: bits go to the layers where they help most, or to all layers alike.
      gains: one of ``GAINS``: train the gains of all levels (``trained_gains``), fit those of some layers
        (``GAINED``), or leave the levels as they are. With too few tokens, or one level, they are fitted.
      refit: fit weights to what graded reading makes of their inputs (``refit``), where there are tokens
        enough to fit to, or round them as they are.

    Attributes:
      gains: one of ``GAINS``: what is really done.
      refit: names of the parts that are refitted, in every layer.
      not_done: a line for each thing that was asked for and is not done, and why.
    """

    def __init__(
        self,
        source: HFCheckpoint,
        calibration: Calibration,
        *,
        max_bits: int,
        quantizer: str,
        basis: str,
        split: str,
        gains: str,
        refit: bool,
    ):
        self.source = source
        self.shapes = linear_shapes(source.config)
        self.weights: HFCheckpoint | RotatedCheckpoint = source
        self.sensitivities: dict[str, np.ndarray] = {}
        self.blocks: dict[str, Int[np.ndarray, "tokens"]] = {}  # of the output projection
        self.inputs: dict[str, statistics.LinearStatistics] = {}
        self.tables: dict[str, np.ndarray] = {}
        self.calibration = calibration
        # A basis suits the text that it was made from better than any other, so thresholds are placed on
        # other windows: they would read too much of all text but that.
        self.survey_windows, self.threshold_windows = windows_of_two_kinds(calibration.windows)
        self.max_bits = max_bits
        self.quantizer = quantizer
        self.basis = basis
        self.split = split
        trainable = calibration.windows.size >= trained_gains.LEAST_TOKENS and max_bits > DIGIT_BITS
        self.gains = gains if gains != TRAINED or trainable else FITTED
        self.fitted_gains: dict[str, np.ndarray] = {}
        # float32 where bfloat16 is emulated, and slow.
        self.compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        widths = input_widths(self.shapes)
        itemsize = jnp.dtype(self.compute_dtype).itemsize
        self.refit_windows = fitting_windows(self.survey_windows, widths, itemsize)
        self.refit = refitted_parts(self.refit_windows, widths) if refit else []
        self.not_done = [line] if refit and (line := shortage(self.refit_windows, widths)) else []
        if self.gains != gains and max_bits > DIGIT_BITS:
            tokens = f"{calibration.windows.size:,} calibration tokens"
            self.not_done.append(f"gains were fitted, not trained: {tokens} are too few")

    @property
    def steps(self) -> int:
        """How many times ``write`` calls ``done``."""
        passes = 5 if self.basis == PRINCIPAL else 4
        training = trained_gains.STEPS if self.gains == TRAINED else 0
        return passes * self.source.config.num_layers + training + 2

    def write(
        self, out: Path, *, overwrite: bool = False, done: Callable[[str], None] = lambda part: None
    ) -> Path:
        """Writes the checkpoint, going on where an interrupted conversion stopped.

        What was found out before the first part died with the process and is found out again.

        Args:
          out: directory to make.
          overwrite: see ``Writer``.
          done: called with each part's name when it is.

        Raises:
          CheckpointError: see ``Writer``, ``HFCheckpoint.read`` and ``quantize_linear``.
        """
        with Writer(out, fingerprint=self.fingerprint(), overwrite=overwrite) as writer:
            self._survey(done)
            self._place_thresholds(done)
            refit = self._embed(writer)
            done("embed")
            for i in range(self.source.config.num_layers):
                self._layer(writer, i, refit)
                done(f"layers.{i}")
            self._head(writer, refit)
            done(HEAD)
            del refit
            if self.gains == TRAINED:
                self._train_gains(writer, done)
            quantization = QuantizationConfig(
                max_bits=self.max_bits, targets=target_grid(self.max_bits), provenance=self.provenance()
            )
            return writer.finalize(self.source.hf_config, quantization, self.source.companions)

    def fingerprint(self) -> str:
        """Equal for two conversions whose parts are interchangeable (see ``Writer``)."""
        files = sorted(set(self.source.files.values()))
        state = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        facts = [self.provenance(), self.source.hf_config, state, str(jnp.dtype(self.compute_dtype))]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What ``quantization_config`` records about how the checkpoint was made."""
        windows = self.calibration.windows
        return {
            "converter": f"grinqh-jax {__version__}",
            "quantizer": self.quantizer,
            "basis": self.basis,
            "split": self.split,
            "gains": self.gains,
            "refit": self.refit,
            "bits_per_weight_stored": round(bits_per_weight_stored(self.source, self.max_bits), 4),
            "calibration": {
                "text": self.calibration.name,
                "windows": len(windows),
                "window_tokens": windows.shape[1],
                "tokens_sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
            },
        }

    def _survey(self, done: Callable[[str], None]) -> None:
        """Chooses the basis, and finds what each output matters, on windows that thresholds do not see."""
        windows, axes = self.survey_windows, None
        if self.basis == PRINCIPAL:
            axes = principal_axes(second_moments(self.source, windows, self.compute_dtype, done))
        found = output_sensitivities(self.source, windows, self.compute_dtype, axes=axes, done=done)
        found[HEAD] = vocabulary.smooth_sensitivities(found[HEAD])
        heads = [name for name in self.shapes if of_head(name)]
        self.blocks = dict(zip(heads, vocabulary.token_blocks(found[HEAD]), strict=True))
        self.sensitivities = found | {name: found[HEAD][tokens] for name, tokens in self.blocks.items()}
        if axes is not None:
            self.weights = RotatedCheckpoint(self.source, axes, self.sensitivities)

    def _place_thresholds(self, done: Callable[[str], None]) -> None:
        """The tables of all layers, which share the bits: from each one's inputs, and its codes' errors."""
        hidden = embed(self.weights, self.threshold_windows, self.compute_dtype)
        errors = {}
        for i in range(self.source.config.num_layers):
            kernels, norms = read_layer(self.weights, i)
            layer = dense_layer(self.weights, kernels, norms, self.compute_dtype)
            for part, seen in statistics.through_layer(layer, hidden).items():
                name = f"layers.{i}.{part}"
                self.inputs[name] = seen
                leaves, errors[name] = self._quantize(name, lambda n, w=kernels[part]: w[:, n])
                self.fitted_gains[name] = leaves["gains"]
            del layer  # or it would be in memory beside the next one
            done(f"grade {i}")
        seen = statistics.of_head(self._norm(), hidden)
        for name, tokens in self.blocks.items():
            self.inputs[name] = seen
            leaves, errors[name] = self._quantize(
                name, lambda n, tokens=tokens: self._head_outputs(tokens[n])
            )
            self.fitted_gains[name] = leaves["gains"]
        costs = {
            name: GradedCosts(self.inputs[name].counts, errors[name], math.prod(shape))
            for name, shape in self.shapes.items()
        }
        alone = [{name: cost} for name, cost in costs.items()]
        for together in [smooth_sensitivities(costs)] if self.split == SENSITIVITY else alone:
            self.tables |= threshold_tables(together, target_grid(self.max_bits))

    def _embed(self, writer: Writer) -> Refit | None:
        """Writes the embedding; where weights are refitted, returns the windows that they are fitted on."""
        key = "embed.embedding"
        vocab, width = self.source.parameters[key]
        if "embed" not in writer.parts:
            embedding = np.empty((vocab, width), STORED_DTYPE)
            rows = max(BLOCK_VALUES // width, 1)
            for start in range(0, vocab, rows):
                stop = min(start + rows, vocab)
                embedding[start:stop] = self.weights.read(key, slice(start, stop))
            writer.save_part("embed", unflatten_dict({key: embedding}, sep="."))
        if not self.refit:
            return None
        hidden = embed(self.weights, self.refit_windows, self.compute_dtype)
        return Refit(hidden, self.tables, target_grid(self.max_bits))

    def _layer(self, writer: Writer, i: int, refit: Refit | None) -> None:
        """Writes a layer; where weights are refitted, their windows go on to the next."""
        name = f"layers.{i}"
        if name in writer.parts:
            if refit is not None and (streams := writer.resume_state(name)) is not None:
                refit.streams = streams
            return
        kernels, norms = read_layer(self.weights, i)
        saved = {part: {"scale": scale.astype(STORED_DTYPE)} for part, scale in norms.items()}
        if refit is not None:
            layer = dense_layer(self.weights, kernels, norms, self.compute_dtype)
            refit.set_input_norm(layer.input_norm)
        for part in LAYER_LINEARS:
            linear_name = f"{name}.{part}"

            def read(outputs: slice, linear_name=linear_name, part=part) -> np.ndarray | Array:
                w = kernels[part][:, outputs]
                return w if refit is None else refit.fitted(linear_name, w, outputs)

            saved[part], _ = self._quantize(linear_name, read)
            del kernels[part]  # or two copies of the layer would be in memory beside the windows
            if refit is not None:
                arrays = {leaf: jnp.asarray(array) for leaf, array in saved[part].items()}
                linear = linear_of(arrays, self.shapes[linear_name], self.compute_dtype)
                refit.advance(linear_name, layer, linear)
            if self.gains == TRAINED:
                del saved[part]["gains"]
        writer.save_part(name, {"layers": {str(i): saved}}, resume_state=refit and refit.streams)

    def _head(self, writer: Writer, refit: Refit | None) -> None:
        if HEAD in writer.parts:
            return
        norm = self._norm()
        if refit is not None:
            refit.set_input_norm(norm)
        saved = {"norm.scale": np.asarray(norm.scale[...], STORED_DTYPE)}
        saved[f"{HEAD}.columns"] = vocabulary.token_columns(list(self.blocks.values()))
        for name, tokens in self.blocks.items():

            def read(outputs: slice, name=name, tokens=tokens) -> np.ndarray | Array:
                w = self._head_outputs(tokens[outputs])
                return w if refit is None else refit.fitted(name, w, outputs)

            saved[name], _ = self._quantize(name, read)
            if self.gains == TRAINED:
                del saved[name]["gains"]
        writer.save_part(HEAD, unflatten_dict(saved, sep="."))

    def _train_gains(self, writer: Writer, done: Callable[[str], None]) -> None:
        """Writes the gains of all layers, whose other leaves are all written."""
        if TRAINED_GAINS in writer.parts:
            for step in range(trained_gains.STEPS):
                done(f"{TRAINED_GAINS} {step}")
            return
        targets, dtype = target_grid(self.max_bits), self.compute_dtype
        graded = GradedParts(self.source, self.weights, writer.read_part, self.blocks, targets, dtype)
        gains = trained_gains.train_gains(graded, self.calibration.windows, self.fitted_gains, done)
        leaves = {f"{name}.gains": array for name, array in gains.items()}
        writer.save_part(TRAINED_GAINS, unflatten_dict(leaves, sep="."))

    def _head_outputs(self, tokens: Int[np.ndarray, "n"]) -> np.ndarray | Array:
        return self.weights.read(f"{HEAD}.kernel", tokens)

    def _norm(self) -> RMSNorm:
        return RMSNorm(jnp.asarray(self.weights.read("norm.scale")), self.source.config.rms_norm_eps)

    def _quantize(
        self, name: str, read_outputs: Callable[[slice], np.ndarray | Array]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The leaves of a layer, with its thresholds once they are placed, and the errors of its levels."""
        leaves, errors = quantize_linear(
            read_outputs,
            self.shapes[name],
            self.inputs[name],
            QUANTIZERS[self.quantizer],
            sensitivities=self.sensitivities[name],
            max_bits=self.max_bits,
            gained=self.gains != NONE and (of_head(name) or name.endswith(GAINED)),
            name=name,
        )
        return leaves | ({"thresholds": self.tables[name]} if self.tables else {}), errors
