"""The ``quantization_config`` in a checkpoint's ``config.json``."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from grinqh_jax.errors import CheckpointError
from pallas_kernels.weight import num_planes

QUANT_METHOD = "grinqh"
VERSION = 2
"""Version that is written."""

READABLE_VERSIONS = (1, VERSION)
"""Versions of the format that this library reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The ``quantization_config`` of a GRINQH checkpoint.

    Attributes:
      max_bits: Bits stored per weight: 2, 4, 6 or 8.
      targets: Mean bits that the threshold tables were calibrated for. At least two numbers that ascend in
        equal steps and end at ``max_bits``. Row ``t`` of each ``thresholds`` leaf belongs to ``targets[t]``.
      provenance: Record of how the checkpoint was made: quantizer, calibration text and tokens, versions,
        stored bits per weight. JSON values for reports; they do not change any computation.

    Raises:
      CheckpointError: A field breaks these rules. The message names all such fields.
    """

    max_bits: int
    targets: tuple[float, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        problems = []
        try:
            num_planes(self.max_bits)
        except ValueError as error:
            problems.append(str(error))
        if problem := _grid_problem(self.targets, self.max_bits):
            problems.append(problem)
        if not isinstance(self.provenance, Mapping):
            problems.append(f"provenance must be an object, not {type(self.provenance).__name__}")
        if problems:
            raise CheckpointError("quantization_config: " + "; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object for ``config.json``."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "max_bits": self.max_bits,
            "targets": list(self.targets),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, entry: Any) -> "QuantizationConfig":
        """Parses the object of ``to_json``.

        Raises:
          CheckpointError: ``entry`` is not an object, belongs to another method or version, or has a field
            that is missing, unknown or wrong.
        """
        if not isinstance(entry, Mapping):
            raise CheckpointError(
                f"quantization_config must be an object, not {type(entry).__name__}; convert the model again"
            )
        method, version = entry.get("quant_method"), entry.get("version")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config: quant_method is {method!r}, expected {QUANT_METHOD!r}; "
                "convert the original (unquantized) model with grinqh-jax convert"
            )
        if version not in READABLE_VERSIONS or isinstance(version, bool):
            remedy = "install a newer grinqh-jax" if _newer(version) else "convert the model again"
            raise CheckpointError(
                f"quantization_config: version is {version!r}, this grinqh-jax reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}; {remedy}"
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        given = set(entry) - {"quant_method", "version"}
        problems = [f"{name} is missing" for name in sorted(fields - given)]
        problems += [f"{name} is unknown" for name in sorted(given - fields)]
        if problems:
            raise CheckpointError("quantization_config: " + "; ".join(problems))
        targets = entry["targets"]
        return cls(
            max_bits=entry["max_bits"],
            targets=tuple(targets) if isinstance(targets, list) else targets,
            provenance=entry["provenance"],
        )


def _newer(version: Any) -> bool:
    return isinstance(version, int | float) and version > VERSION


def _grid_problem(targets: Any, max_bits: Any) -> str | None:
    """Returns what is wrong with the grid of targets, or None."""
    if not isinstance(targets, tuple) or len(targets) < 2:
        return f"targets must be a list of two or more numbers, not {targets!r:.80}"
    if not all(type(target) in (int, float) and 0 <= target <= 8 for target in targets):
        return f"targets must be numbers from 0 to 8, not {targets!r:.80}"
    steps = [after - before for before, after in itertools.pairwise(targets)]
    if steps[0] <= 0 or any(abs(step - steps[0]) > 1e-6 for step in steps):
        return f"targets must ascend in equal steps, not {targets!r:.80}"
    if targets[-1] != max_bits:
        return f"targets must end at max_bits ({max_bits!r}), not at {targets[-1]!r}"
    return None
