"""Compares levels of 0, 2, 4, 6, 8 bits with levels of 0, 1, 2, 4, 6, 8 bits by the modelled divergence.

    python benchmarks/first_level.py --model DIR_OR_GGUF --output FILE

The divergence is modelled as ``checkpoints_tools.calibration.allocation`` does: the sum over all layers of
``x**2 e(l)``, at the least value that a mean of bits allows. A level of one bit reads the sign of a weight.
All levels have their least-squares gain. The script also prints the rows of planes that a step reads for each
input channel: an entry of the kernel's list costs time whether its row has one bit a weight or two.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools.calibration import allocation
from checkpoints_tools.calibration.text import DEFAULT_TOKENS, read_calibration
from checkpoints_tools.convert import compilation, quantize_linear
from checkpoints_tools.convert.measure_layers import measure_layers
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from checkpoints_tools.convert.survey import survey
from checkpoints_tools.quantizers import LevelFit, level_fit
from checkpoints_tools.source.open import open_source
from grinqh_jax.checkpoint import Writer
from pallas_kernels import layout

MEAN_BITS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
TODAY = np.array([0, 2, 4, 6, 8])
WITH_ONE = np.array([0, 1, 2, 4, 6, 8])
ROWS_TODAY = np.array([0, 1, 2, 3, 4])
ROWS_WITH_ONE = np.array([0, 1, 2, 3, 4, 5])
"""Bits of the levels, and rows of planes that a channel at each level reads."""


@jax.jit
def one_bit_error(w, rounded, sensitivities):
    """Returns the weighted mean square error of ``g sign(w) scale`` with the best gain g for each weight."""
    scale = jnp.repeat(rounded.scales.astype(jnp.float32), layout.GROUP, axis=0)[: w.shape[0]]
    sign = jnp.where(rounded.codes >= 128, scale, -scale)
    product, square, energy = (jnp.mean(a * sensitivities) for a in (w * sign, sign**2, w**2))
    return energy - jnp.where(square > 0, product**2 / square, 0)


def fit_with_one_bit(w, rounded, sensitivities, *, num_planes: int) -> LevelFit:
    """Returns the fit of the levels, errors after their gains, and that of one bit behind the others."""
    fit = level_fit(w, rounded, sensitivities, num_planes=num_planes)
    gained = fit.errors[1:] - jnp.where(fit.squares > 0, fit.slopes**2 / fit.squares, 0)
    one_bit = one_bit_error(w.astype(jnp.float32), rounded, sensitivities)
    return fit._replace(errors=jnp.concatenate([fit.errors[:1], gained, one_bit[None]]))


def costs_at(layers, bits, rows, log_lambda: float) -> np.ndarray:
    """Returns mean bits per weight, modelled divergence, and rows read per channel for one lambda."""
    patterns = (np.arange(0x7F80, dtype=np.uint32) << 16) + (1 << 15)
    squares = patterns.view(np.float32).astype(np.float64) ** 2
    total, sums = 0, np.zeros(3)
    for layer in layers:
        counts = np.asarray(layer.counts[:0x7F80], np.float64)
        counts = counts / counts.sum()
        used = np.flatnonzero(counts)
        cost = squares[used, None] * layer.errors + np.exp(log_lambda) * bits
        level = np.argmin(cost, axis=1)
        share = counts[used]
        sums += layer.weights * np.array(
            [share @ bits[level], share @ (squares[used] * layer.errors[level]), share @ rows[level]]
        )
        total += layer.weights
    return sums / [total, 1, total]


def at_mean(layers, bits, rows, wanted: float) -> np.ndarray:
    """Returns ``costs_at`` for the lambda that reads ``wanted`` bits."""
    low, high = -80.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs_at(layers, bits, rows, middle)[0] > wanted else (low, middle)
    return costs_at(layers, bits, rows, high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_GGUF", help="unquantized model")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="calibration tokens")
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write"
    )
    args = parser.parse_args()
    compilation.prepare()
    source = open_source(args.model)
    plan = make_plan(source, read_calibration(source, [], args.tokens), Options(gains="fitted", refit=False))
    with (
        mock.patch.object(quantize_linear, "level_fit", fit_with_one_bit),
        tempfile.TemporaryDirectory() as directory,
        Writer(pathlib.Path(directory) / "out", fingerprint=plan.fingerprint(), overwrite=False) as writer,
    ):
        surveyed = survey(plan, pathlib.Path(directory), lambda note: print(note, flush=True))
        measured = measure_layers(plan, surveyed, writer, lambda note: print(note, flush=True))
    named = {
        name: allocation.GradedCosts(linear.inputs.counts, linear.errors, int(np.prod(plan.shapes[name])))
        for name, linear in measured.linears.items()
    }
    smoothed = list(allocation.smooth_sensitivities(named).values())
    order = [0, 5, 1, 2, 3, 4]  # The error of one bit stands behind the others.
    today = [allocation.GradedCosts(c.counts, c.errors[:5], c.weights) for c in smoothed]
    with_one = [allocation.GradedCosts(c.counts, c.errors[order], c.weights) for c in smoothed]
    rows = []
    for wanted in MEAN_BITS:
        a, b = at_mean(today, TODAY, ROWS_TODAY, wanted), at_mean(with_one, WITH_ONE, ROWS_WITH_ONE, wanted)
        rows.append(
            {
                "bits": wanted,
                "divergence_with_one_bit_over_today": round(b[1] / a[1], 4),
                "divergence": float(a[1]),
                "rows_per_channel": round(a[2], 3),
                "rows_per_channel_with_one_bit": round(b[2], 3),
            }
        )
        print(rows[-1], flush=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
