"""The conversion: a Hugging Face checkpoint becomes a GRINQH checkpoint, one decoder layer at a time.

Memory holds one layer, the hidden states of the calibration windows, and, at the two ends, the
embedding or the quantized output projection; never the model.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Int, Int32

from checkpoints_tools import vocabulary
from checkpoints_tools.calibration import statistics
from checkpoints_tools.calibration.allocation import GradedCosts, target_grid, threshold_tables
from checkpoints_tools.calibration.sensitivity import output_sensitivities
from checkpoints_tools.calibration.text import windows_of_two_kinds
from checkpoints_tools.principal_basis import RotatedCheckpoint, principal_axes, second_moments
from checkpoints_tools.quantize_linear import quantize_linear
from checkpoints_tools.quantizers import QUANTIZERS
from checkpoints_tools.source_layer import BLOCK_VALUES, dense_layer, read_layer
from grinqh_jax import __version__
from grinqh_jax.apply import HEAD, of_head
from grinqh_jax.checkpoint import QuantizationConfig, Writer
from grinqh_jax.decoder import LAYER_LINEARS, RMSNorm, linear_shapes
from grinqh_jax.hf import HFCheckpoint
from pallas_kernels import NestedWeight

PRINCIPAL, ORIGINAL = BASES = ("principal", "original")
"""See ``Conversion``."""

SENSITIVITY, UNIFORM = SPLITS = ("sensitivity", "uniform")
"""Likewise."""

FITTED, NONE = GAINS = ("fitted", "none")
"""Likewise."""

GAINED = (".qkv",)
"""Linear layers whose levels get gains, beside the output projection. In the others skipping takes from sums
that add up (a head's values, SwiGLU's products), or the result goes through SwiGLU: there levels that are
too large make up for what is missing, and with gains the 32m model of ``docs/quality.md`` diverges more."""

THRESHOLDS = "thresholds"
"""Name of the part that holds the thresholds of all layers, and of each one's leaf."""

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
      gains: one of ``GAINS``: fit gains to the levels of some layers (``GAINED``), or leave them as they are.
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
    ):
        self.source = source
        self.shapes = linear_shapes(source.config)
        self.weights: HFCheckpoint | RotatedCheckpoint = source
        self.sensitivities: dict[str, np.ndarray] = {}
        self.blocks: dict[str, Int[np.ndarray, "tokens"]] = {}  # of the output projection
        self.costs: dict[str, GradedCosts] = {}
        self.calibration = calibration
        # A basis suits the text that it was made from better than any other, so thresholds are placed on
        # other windows: they would read too much of all text but that.
        self.survey_windows, self.threshold_windows = windows_of_two_kinds(calibration.windows)
        self.max_bits = max_bits
        self.quantizer = quantizer
        self.basis = basis
        self.split = split
        self.gains = gains
        # float32 where bfloat16 is emulated, and slow.
        self.compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    @property
    def steps(self) -> int:
        """How many times ``write`` calls ``done``."""
        passes = 4 if self.basis == PRINCIPAL else 3
        return passes * self.source.config.num_layers + 3

    def write(
        self, out: Path, *, overwrite: bool = False, done: Callable[[str], None] = lambda part: None
    ) -> Path:
        """Writes the checkpoint, going on where an interrupted conversion stopped.

        Parts that are already written are not quantized again, but the calibration windows run through
        their layers once more, because their hidden states died with the process.

        Args:
          out: directory to make.
          overwrite: see ``Writer``.
          done: called with each part's name when it is.

        Raises:
          CheckpointError: see ``Writer``, ``HFCheckpoint.read`` and ``quantize_linear``.
        """
        with Writer(out, fingerprint=self.fingerprint(), overwrite=overwrite) as writer:
            self._survey(done)
            hidden = self._embed(writer)
            done("embed")
            for i in range(self.source.config.num_layers):
                self._layer(writer, i, hidden)
                done(f"layers.{i}")
            self._head(writer, hidden)
            done(HEAD)
            self._thresholds(writer)
            done("thresholds")
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
        found[HEAD] = vocabulary.for_any_text(found[HEAD])
        heads = [name for name in self.shapes if of_head(name)]
        self.blocks = dict(zip(heads, vocabulary.token_blocks(found[HEAD]), strict=True))
        self.sensitivities = found | {name: found[HEAD][tokens] for name, tokens in self.blocks.items()}
        if axes is not None:
            self.weights = RotatedCheckpoint(self.source, axes, self.sensitivities)

    def _embed(self, writer: Writer) -> np.ndarray:
        key = "embed.embedding"
        vocab, width = self.source.parameters[key]
        embedding = np.empty((vocab, width), STORED_DTYPE)
        rows = max(BLOCK_VALUES // width, 1)
        for start in range(0, vocab, rows):
            embedding[start : start + rows] = self.weights.read(key, slice(start, min(start + rows, vocab)))
        if "embed" not in writer.parts:
            writer.save_part("embed", unflatten_dict({key: embedding}, sep="."))
        return embedding[self.threshold_windows].astype(self.compute_dtype)

    def _layer(self, writer: Writer, i: int, hidden: np.ndarray) -> None:
        """Moves ``hidden`` through layer i and writes the layer."""
        name = f"layers.{i}"
        kernels, norms = read_layer(self.weights, i)
        layer = dense_layer(self.weights, kernels, norms, self.compute_dtype)
        seen = statistics.through_layer(layer, hidden)
        parts = {f"{name}.{part}": seen[part] for part in LAYER_LINEARS}
        if name not in writer.parts:
            saved = {part: {"scale": scale.astype(STORED_DTYPE)} for part, scale in norms.items()}
            errors = {}
            for part in LAYER_LINEARS:
                saved[part], errors[f"{name}.{part}"] = self._quantize(
                    f"{name}.{part}", seen[part], lambda n, w=kernels[part]: w[:, n]
                )
            writer.save_part(name, {"layers": {str(i): saved}}, notes=errors)
        self._note_costs(writer.notes(name), parts)

    def _head(self, writer: Writer, hidden: np.ndarray) -> None:
        scale = self.weights.read("norm.scale")
        seen = statistics.of_head(RMSNorm(jnp.asarray(scale), self.source.config.rms_norm_eps), hidden)
        if HEAD not in writer.parts:
            saved = {"norm.scale": scale.astype(STORED_DTYPE)}
            saved[f"{HEAD}.columns"] = vocabulary.token_columns(list(self.blocks.values()))
            errors = {}
            for name, tokens in self.blocks.items():
                saved[name], errors[name] = self._quantize(
                    name, seen, lambda n, tokens=tokens: self.weights.read(f"{HEAD}.kernel", tokens[n])
                )
            writer.save_part(HEAD, unflatten_dict(saved, sep="."), notes=errors)
        self._note_costs(writer.notes(HEAD), dict.fromkeys(self.blocks, seen))

    def _quantize(
        self, name: str, seen: statistics.LinearStatistics, read_outputs
    ) -> tuple[dict[str, np.ndarray], list[float]]:
        leaves, errors = quantize_linear(
            read_outputs,
            self.shapes[name],
            seen,
            QUANTIZERS[self.quantizer],
            sensitivities=self.sensitivities[name],
            max_bits=self.max_bits,
            gained=self.gains == FITTED and (of_head(name) or name.endswith(GAINED)),
            name=name,
        )
        return leaves, errors.tolist()

    def _note_costs(self, errors: dict[str, list[float]], seen: dict[str, statistics.LinearStatistics]):
        for name in seen:
            weights = math.prod(self.shapes[name])
            self.costs[name] = GradedCosts(seen[name].counts, np.array(errors[name]), weights)

    def _thresholds(self, writer: Writer) -> None:
        """The last part, because the bits are split over all layers together."""
        if THRESHOLDS not in writer.parts:
            together = [self.costs] if self.split == SENSITIVITY else [{n: c} for n, c in self.costs.items()]
            tables = {}
            for costs in together:
                tables |= threshold_tables(costs, target_grid(self.max_bits))
            leaves = {f"{name}.{THRESHOLDS}": table for name, table in tables.items()}
            writer.save_part(THRESHOLDS, unflatten_dict(leaves, sep="."))


def bits_per_weight_stored(source: HFCheckpoint, max_bits: int) -> float:
    """Bits that a weight of the linear layers takes in memory, scales and padding included."""
    shapes = linear_shapes(source.config).values()
    stored = sum(
        leaf.size * leaf.dtype.itemsize
        for shape in shapes
        for leaf in jax.tree.leaves(NestedWeight.abstract(*shape, max_bits))
    )
    return 8 * stored / sum(k * n for k, n in shapes)


def directory_bytes(directory: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(os.path.getsize(file) for file in directory.rglob("*") if file.is_file())
