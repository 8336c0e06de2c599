"""The curves of a sweep: a method, its settings, and the checkpoint that each is measured on.

Checkpoints are made on first use in a work directory, and found there by the next run.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checkpoints_tools.baselines import __main__ as baselines
from checkpoints_tools.baselines import model as fixed
from checkpoints_tools.baselines import reading
from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import command as convert
from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.statistics import SCALE_BITS
from grinqh_jax.errors import UsageError
from grinqh_jax.hf import HFCheckpoint

GRINQH, WHOLE_HEAD, UNQUANTIZED = "grinqh", "whole-head", "full"
SKIP_INT4, TRUNCATION = "skip-int4", "truncation"
FIXED: dict[str, tuple[str, list[str]]] = {
    "rtn": ("RTN", ["--method", "rtn"]),
    "gptq": ("GPTQ", ["--method", "gptq"]),
    "gptq-act-order": ("GPTQ, act-order", ["--method", "gptq", "--act-order"]),
    "awq": ("AWQ", ["--method", "awq"]),
}
"""Fixed precision: label and flags of ``checkpoints_tools.baselines``."""
METHODS = (*FIXED, SKIP_INT4, TRUNCATION, WHOLE_HEAD, GRINQH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    Attributes:
      method: one of ``METHODS``, or ``UNQUANTIZED``.
      label: what a figure calls it.
      settings: its bits, of the integers or on the dial.
      shown: those of ``settings`` that tables and figures show.
      checkpoint: path of the checkpoint of a setting, which this makes if need be.
      load: the generator that measures this setting.
      dial: where its dial stands.
      bits_read: from realised bits without and with the output projection to bits read per weight, scales
        and zero points included: of the layers, and of all linear layers.
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
        """Settings by the checkpoint that serves them."""
        found: dict[Path, list[Bits]] = {}
        for bits in self.settings:
            found.setdefault(self.checkpoint(bits), []).append(bits)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepContext:
    """Where checkpoints are made, and from what.

    Attributes:
      source: the unquantized checkpoint.
      work: directory for what is made.
      calib: calibration text (None: the bundled one), and ``calib_tokens`` of it, of all methods.
      dtype: that models are measured in, ``float32`` or ``bfloat16``; None: what the device prefers.
    """

    source: HFCheckpoint
    work: Path
    calib: Path | None
    calib_tokens: int
    dtype: str | None

    def load(self, checkpoint: Path) -> Generator:
        """A checkpoint, in ``dtype``."""
        return Generator.load(checkpoint, self.dtype and jnp.dtype(self.dtype))

    def unquantized(self) -> Series:
        """The model itself, in 16 bits."""
        return Series(
            method=UNQUANTIZED,
            label="full precision",
            settings=(FULL,),
            shown=frozenset((FULL,)),
            checkpoint=lambda bits: self.source.directory,
            load=lambda bits: self.load(self.source.directory),
            dial=lambda bits: FULL,
            bits_read=lambda bits, layers, everything: (fixed.UNQUANTIZED_BITS, fixed.UNQUANTIZED_BITS),
        )

    def fixed_precision(self, method: str, settings: Sequence[int]) -> Series:
        """A method of ``FIXED`` at each number of bits."""
        label, flags = FIXED[method]

        def checkpoint(bits: Bits) -> Path:
            options = [*flags, "--w-bits", f"{bits:g}"]
            return self._made(f"{method}-{bits:g}", options, baselines.main)

        return Series(
            method=method,
            label=label,
            settings=tuple(settings),
            shown=frozenset(settings),
            checkpoint=checkpoint,
            load=lambda bits: self.load(checkpoint(bits)),
            dial=lambda bits: FULL,
            bits_read=lambda bits, layers, everything: fixed.mean_bits_read(self.source, int(bits)),
        )

    def grinqh(self, label: str, options: Sequence[str], settings: Sequence[float], shown) -> Series:
        """A GRINQH checkpoint converted with ``options``."""
        return self._graded(GRINQH, label, options, settings, shown, lambda generator: generator)

    def reread(self, method: str, options: Sequence[str], settings: Sequence[float]) -> Series:
        """The checkpoint of ``grinqh(..., options)`` read in another way: see ``baselines.reading``."""
        if method == TRUNCATION:
            stored = range(2, converter_flags(options).max_bits + 1, 2)
            return self._graded(
                method, "truncation of the nested code", options, stored, None, reading.truncation
            )
        if method == WHOLE_HEAD:
            most = converter_flags(options).max_bits
            return dataclasses.replace(
                self._graded(method, "GRINQH, whole head", options, settings, None, reading.whole_head),
                dial=lambda bits: reading.with_whole_head(bits, self.source.config, most),
            )
        settings = [bits for bits in settings if bits <= reading.INT4_BITS]

        def skipping(generator: Generator) -> Generator:
            calibration = read_calibration(self.source, self.calib, self.calib_tokens)
            return reading.skip_int4(generator, calibration.windows)

        return self._graded(method, "skip and int4 (TEAL)", options, settings, None, skipping)

    def _graded(self, method, label, options, settings, shown, reread) -> Series:
        name = f"{GRINQH}-{_short_hash([*options])}" if options else GRINQH

        def checkpoint(bits: Bits) -> Path:
            return self._made(name, options, convert.main)

        return Series(
            method=method,
            label=label,
            settings=tuple(settings),
            shown=frozenset(settings if shown is None else shown),
            checkpoint=checkpoint,
            load=lambda bits: reread(self.load(checkpoint(bits))),
            dial=lambda bits: bits,
            bits_read=lambda bits, layers, everything: (layers + SCALE_BITS, everything + SCALE_BITS),
        )

    def _made(self, name: str, options: Sequence[str], command: Callable[[list[str]], int]) -> Path:
        """The checkpoint ``name``, made by ``command`` if it is not there; whole, whatever interrupts."""
        calibration = ["--tokens", str(self.calib_tokens)]
        if self.calib is not None:
            calibration += ["--calib", str(self.calib)]
        facts = {"model": str(self.source.directory), "flags": [*options, *calibration]}
        out, making, record = (self.work / (name + end) for end in ("", ".making", ".json"))
        if out.exists():
            made = json.loads(record.read_text()) if record.exists() else None
            if made != facts:
                raise UsageError(
                    f"{out} was made of another model or with other flags; name another --work directory"
                )
            return out
        if command is not convert.main:  # a conversion goes on where it stopped
            shutil.rmtree(making, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        print(f"making {out}", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            code = command([*options, *calibration, "--model", facts["model"], "--out", str(making)])
        if code:  # the command has said why
            raise SystemExit(code)
        record.write_text(json.dumps(facts))
        making.rename(out)
        return out


def converter_flags(options: Sequence[str]) -> argparse.Namespace:
    """The converter's flags; ends with its message if it does not know them."""
    return convert.parser().parse_args([*options, "--model", "model", "--out", "out"])


def identity(checkpoint: Path) -> list[Any]:
    """Changes when a checkpoint is made anew: sizes and times of its manifest or weights."""
    files = [checkpoint / "manifest.json", *sorted(checkpoint.glob("*.safetensors"))]
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files if file.exists()]


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
