"""Kernel times for the bits that a row reads, from a file of ``benchmarks/matvec.py``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.pareto.rows import Row
from checkpoints_tools.pareto.series import FIXED, UNQUANTIZED
from grinqh_jax.errors import UsageError
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_shapes

_INT4_BITS = 4

_TOLERANCE = 0.05
"""Largest distance of realised bits from the measured range."""


class Timing:
    """Times of matvecs by shape: graded at several bits, bf16, and int4 if the file has it.

    The time of a token covers all linear layers of the model if the file has their shapes; otherwise only the
    decoder layers; otherwise one matvec of each shape in the file. Every layer is assumed to read the mean
    bits.

    Args:
      path: File of kernel times.
      config: Configuration of the model.

    Attributes:
      what: Description of the times: the layers that they cover, and the device.

    Raises:
      UsageError: The file does not hold kernel times.
    """

    def __init__(self, path: Path, config: ModelConfig):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._kernel: dict[str, dict[float, float]] = {}
            for row in content["kernel"]:
                if row["rows"] == 1:
                    self._kernel.setdefault(row["shape"], {})[row["bits"]] = row["kernel_us"]
            self._bf16: Mapping[str, float] = content["xla_bf16_us"]
            self._int4: Mapping[str, float] = content.get("torch_int4_us", {})
            device = content["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} does not hold kernel times ({type(error).__name__}: {error}); make such a file with "
                "benchmarks/matvec.py --output"
            ) from None
        self._bits = "realised_bits_without_head"
        shapes = {name: f"{k}x{n}" for name, (k, n) in linear_shapes(config).items()}
        if set(shapes.values()) <= set(self._kernel):
            self._shapes, self._bits = list(shapes.values()), "realised_bits"
            self.what = f"kernel time of a token's matvecs, {device}"
        elif {shape for name, shape in shapes.items() if not in_head(name)} <= set(self._kernel):
            self._shapes = [shape for name, shape in shapes.items() if not in_head(name)]
            self.what = f"kernel time of a token's matvecs without the output projection, {device}"
        else:
            self._shapes = list(self._kernel)
            self.what = f"kernel time of one layer of {', '.join(self._shapes)}, {device}"

    def us(self, row: Row) -> float | None:
        """Returns microseconds at the bits that a row reads, or None if the file does not cover them.

        Graded times are interpolated linearly. Full precision has the time of bf16, and 4-bit integers have
        the time of the int4 kernel; other integers have none.
        """
        if row["method"] == UNQUANTIZED:
            return self._total(self._bf16)
        if row["method"] in FIXED:
            return self._total(self._int4) if row["bits"] == _INT4_BITS else None
        bits = row[self._bits]
        times = {shape: self._interpolated(shape, bits) for shape in set(self._shapes)}
        return self._total({shape: time for shape, time in times.items() if time is not None})

    def _total(self, times: Mapping[str, Any]) -> float | None:
        """Returns the sum over the matvecs of a token; None if a shape has no time."""
        if any(shape not in times for shape in self._shapes):
            return None
        return float(sum(times[shape] for shape in self._shapes))

    def _interpolated(self, shape: str, bits: float) -> float | None:
        """Returns the microseconds of a graded matvec; None outside of the measured bits."""
        measured = sorted(self._kernel[shape].items())
        if not measured[0][0] - _TOLERANCE <= bits <= measured[-1][0] + _TOLERANCE:
            return None
        measured_bits, times = zip(*measured, strict=True)
        return float(np.interp(bits, np.asarray(measured_bits), np.asarray(times)))
