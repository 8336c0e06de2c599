"""The curves of a sweep: a method, its settings, and the checkpoint that each setting is measured on.

A checkpoint is made on first use in a work directory, where the next run finds it.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checkpoints_tools.baselines import model as baselines
from checkpoints_tools.baselines import reading
from checkpoints_tools.calibration.text import Calibration, read_calibration
from checkpoints_tools.convert import driver
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.statistics import SCALE_BITS
from grinqh_jax.errors import UsageError
from grinqh_jax.hf import HFCheckpoint

GRINQH, WHOLE_HEAD, UNQUANTIZED = "grinqh", "whole-head", "full"
SKIP_INT4, TRUNCATION = "skip-int4", "truncation"
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("RTN", {"method": "rtn"}),
    "gptq": ("GPTQ", {"method": "gptq"}),
    "gptq-act-order": ("GPTQ, act-order", {"method": "gptq", "act_order": True}),
    "awq": ("AWQ", {"method": "awq"}),
}
"""Fixed-precision methods: label, and fields of ``baselines.model.Options`` beside the bits."""
METHODS = (*FIXED, SKIP_INT4, TRUNCATION, WHOLE_HEAD, GRINQH)

ProgressBar = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[..., Any]]]
"""Opens a progress bar for a description, a number of units and their name, such as
``cli.progress.Progress``. The bar is called with the units completed, and a note."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
      method: One of ``METHODS``, or ``UNQUANTIZED``.
      label: Name of the curve in figures and tables.
      settings: Bits of the integers, or settings of the dial.
      shown: Settings that tables and figures show.
      checkpoint: Returns the path of the checkpoint of a setting, making the checkpoint if necessary.
      load: Returns the generator that measures a setting.
      dial: Returns the position of the generator's dial for a setting.
      bits_read: Returns bits read per weight of the layers and of all linear layers, scales and zero points
        included, for a setting and its realised bits without and with the output projection.
    """

    method: str
    label: str
    settings: tuple[Bits, ...]
    shown: frozenset[Bits]
    checkpoint: Callable[[Bits], Path]
    load: Callable[[Bits], Generator]
    dial: Callable[[Bits], Bits]
    bits_read: Callable[[Bits, float | None, float | None], tuple[float, float]]

    def groups(self) -> dict[Path, list[Bits]]:
        """Returns the settings by the checkpoint that serves them."""
        groups: dict[Path, list[Bits]] = {}
        for bits in self.settings:
            groups.setdefault(self.checkpoint(bits), []).append(bits)
        return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepContext:
    """Source of the checkpoints of a sweep, and the directory they are made in.

    Attributes:
      source: Unquantized checkpoint.
      work: Directory of the checkpoints.
      calib: Calibration text of all methods; None selects the default texts.
      calib_tokens: Maximum number of calibration tokens.
      dtype: Dtype that models are measured in, ``float32`` or ``bfloat16``; None selects the device's.
      progress: Opens a progress bar for each checkpoint that is made.
    """

    source: HFCheckpoint
    work: Path
    calib: Path | None
    calib_tokens: int
    dtype: str | None
    progress: ProgressBar

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration windows of all methods."""
        return read_calibration(self.source, [self.calib] if self.calib else [], self.calib_tokens)

    def load(self, checkpoint: Path) -> Generator:
        """Loads a checkpoint in ``dtype``."""
        return Generator.load(checkpoint, self.dtype and jnp.dtype(self.dtype))

    def unquantized(self) -> Series:
        """Returns the series of the model itself, in 16 bits."""
        return Series(
            method=UNQUANTIZED,
            label="full precision",
            settings=(FULL,),
            shown=frozenset((FULL,)),
            checkpoint=lambda bits: self.source.directory,
            load=lambda bits: self.load(self.source.directory),
            dial=lambda bits: FULL,
            bits_read=lambda bits, layers, everything: (
                baselines.UNQUANTIZED_BITS,
                baselines.UNQUANTIZED_BITS,
            ),
        )

    def fixed_precision(self, method: str, settings: Sequence[int]) -> Series:
        """Returns the series of a method of ``FIXED``.

        Args:
          method: Key of ``FIXED``.
          settings: Bits of the integers.
        """
        label, fields = FIXED[method]

        def checkpoint(bits: Bits) -> Path:
            options = baselines.Options(bits=int(bits), **fields)
            return self._made(f"{method}-{bits:g}", options, self._quantize)

        return Series(
            method=method,
            label=label,
            settings=tuple(settings),
            shown=frozenset(settings),
            checkpoint=checkpoint,
            load=lambda bits: self.load(checkpoint(bits)),
            dial=lambda bits: FULL,
            bits_read=lambda bits, layers, everything: baselines.mean_bits_read(self.source, int(bits)),
        )

    def grinqh(
        self, label: str, options: Options, settings: Sequence[float], shown: Sequence[float]
    ) -> Series:
        """Returns the series of a GRINQH checkpoint that is converted with ``options``."""
        return self._graded(GRINQH, label, options, settings, shown, lambda generator: generator)

    def reread(self, method: str, options: Options, settings: Sequence[float]) -> Series:
        """Returns the series of the same checkpoint read in another way (see ``baselines.reading``).

        Args:
          method: ``TRUNCATION``, ``WHOLE_HEAD`` or ``SKIP_INT4``.
          options: Options of the conversion.
          settings: Mean bits. Truncation uses the stored bits instead; ``SKIP_INT4`` only those up to 4.
        """
        if method == TRUNCATION:
            stored = range(2, options.max_bits + 1, 2)
            label = "truncation of the nested code"
            return self._graded(method, label, options, stored, stored, reading.truncation)
        if method == WHOLE_HEAD:
            label = "GRINQH, whole head"
            series = self._graded(method, label, options, settings, settings, reading.whole_head)
            config = self.source.config

            def dial(bits: Bits) -> Bits:
                return FULL if bits == FULL else reading.with_whole_head(bits, config, options.max_bits)

            return dataclasses.replace(series, dial=dial)
        settings = [bits for bits in settings if bits <= reading.INT4_BITS]
        return self._graded(
            method,
            "skip and int4 (TEAL)",
            options,
            settings,
            settings,
            lambda generator: reading.skip_int4(generator, self.calibration.windows),
        )

    def _graded(
        self,
        method: str,
        label: str,
        options: Options,
        settings: Sequence[float],
        shown: Sequence[float],
        reread: Callable[[Generator], Generator],
    ) -> Series:
        name = GRINQH if options == Options() else f"{GRINQH}-{_short_hash(dataclasses.asdict(options))}"

        def checkpoint(bits: Bits) -> Path:
            return self._made(name, options, self._convert)

        def bits_read(bits: Bits, layers: float | None, everything: float | None) -> tuple[float, float]:
            assert layers is not None, "a graded model counts the bits that it reads"
            assert everything is not None, "a graded model counts the bits that it reads"
            return layers + SCALE_BITS, everything + SCALE_BITS

        return Series(
            method=method,
            label=label,
            settings=tuple(settings),
            shown=frozenset(shown),
            checkpoint=checkpoint,
            load=lambda bits: reread(self.load(checkpoint(bits))),
            dial=lambda bits: bits,
            bits_read=bits_read,
        )

    def _convert(self, options: Options, out: Path) -> None:
        """Converts the source. Resumes an interrupted conversion."""
        plan = make_plan(self.source, self.calibration, options)
        with self.progress(f"convert {self.source.directory.name}", plan.steps, "step") as progress:
            driver.convert(plan, out, on_progress=lambda note: progress(1, note))
        for line in plan.not_done:
            print(line, file=sys.stderr)

    def _quantize(self, options: baselines.Options, out: Path) -> None:
        """Quantizes the source with a baseline, from the beginning."""
        shutil.rmtree(out, ignore_errors=True)
        title = f"{options.method} {self.source.directory.name}"
        with self.progress(title, self.source.config.num_layers, "layer") as progress:
            windows = self.calibration.windows
            baselines.quantize(self.source, windows, out, options, lambda note: progress(1, note))

    def _made(self, name: str, options: Any, make: Callable[[Any, Path], None]) -> Path:
        """Returns the checkpoint called ``name``; ``make(options, directory)`` makes it if it is missing.

        An interrupted run leaves no checkpoint under that name.

        Raises:
          UsageError: The checkpoint was made from another model or with other options, or cannot be written.
        """
        facts = {
            "model": str(self.source.directory),
            "options": dataclasses.asdict(options),
            "calibration": {"text": self.calib and str(self.calib), "tokens": self.calib_tokens},
        }
        out, making, record = (self.work / (name + end) for end in ("", ".making", ".json"))
        if out.exists():
            if not record.exists() or json.loads(record.read_text()) != facts:
                raise UsageError(
                    f"{out} was made from another model or with other options; name another --work directory"
                )
            return out
        print(f"making {out}", file=sys.stderr)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            make(options, making)
            record.write_text(json.dumps(facts))
            making.rename(out)
        except OSError as error:  # The disk is full, or the directory is read-only.
            raise UsageError(f"{error}; fix that and run the same command again to resume") from None
        return out


def identity(checkpoint: Path) -> list[Any]:
    """Returns sizes and times of a checkpoint's manifest or weights, which change when it is made anew."""
    files = [checkpoint / "manifest.json", *sorted(checkpoint.glob("*.safetensors"))]
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files if file.exists()]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
