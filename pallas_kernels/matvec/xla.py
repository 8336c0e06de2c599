"""The graded matvec in XLA operations: what a CPU, or a device without a kernel of its own, runs.

Two programs for the same sum (see ``NestedWeight``), with ``l_k`` the level of channel ``k`` and
``x_k`` its activation times the level's gain:

    ``y_n = sum_s scales[s, n] sum_f sum_{k in s, l_k > f} (x_k 4**-f) (d_f[k, n] - 1.5)``.

*By channel*, for the few rows of a decode step on a CPU: the terms are added one by one, each an
unpack, multiply and add over one row of words. Rows of words that no level reaches are never touched,
so time and memory traffic follow the realised bits, and no dequantized weight is ever stored.

*Dense*, for many rows or another device: slice by slice, the digits of all planes become one float32
matrix ``[P * 128, N]``, which the activations, masked per plane by level, are multiplied with.

Both work in the order of ``layout.digit_major_positions`` and permute the outputs once, at the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading, layout
from pallas_kernels.activations import Activations
from pallas_kernels.weight import NestedWeight

ROWS_BY_CHANNEL = 8
"""Most rows that are computed by channel. For a model of 6 layers and width 256 at 3 bits, on two CPU cores,
by channel costs 1.7 to 2.7 ms a row and dense 23 to 27 ms for any few rows: about even at 10."""


def supports(x, weight: NestedWeight) -> str | None:
    """Always None: XLA takes any rows on any device."""
    del x, weight
    return None


def partial_sums(
    x: Activations, weight: NestedWeight, thresholds: jax.Array
) -> tuple[Activations, grading.GradingStats]:
    """See ``api.graded_partial_sums``. Takes any ``[rows, K]`` and returns one partial."""
    level = grading.levels(x.values, x.scale_thresholds(thresholds))
    stats = grading.stats(x, level)
    padding = ((0, 0), (0, weight.planes.shape[1] - weight.in_features))
    values = x.values.astype(jnp.float32) * grading.gain_of_each(level, weight.level_gains)
    values = jnp.pad(values, padding)
    level = jnp.pad(level, padding)
    positions = layout.digit_major_positions(weight.scales.shape[1])
    scales = weight.scales[:, positions.argsort()].astype(jnp.float32)
    arguments = (values, level, weight.planes, scales)
    if len(values) <= ROWS_BY_CHANNEL:
        y = jax.lax.platform_dependent(*arguments, cpu=_by_channel, default=_dense)
    else:
        y = _dense(*arguments)
    y = y[:, positions[: weight.out_features]] * x.factor()
    return Activations.of(y), stats


def _by_channel(x, level, planes, scales):
    """``x, level [rows, K]``, ``scales [S, N]`` -> ``y [rows, N]``, outputs digit by digit."""
    return jax.lax.map(lambda row: _one_row(*row, planes, scales), (x, level))


def _one_row(x, level, planes, scales):
    num_planes, _, words = planes.shape
    slices, outputs = scales.shape
    x, level = x.reshape(slices, 1, -1), level.reshape(slices, 1, -1)
    f = jnp.arange(num_planes)[:, None]
    # Channels of a slice by falling level: those that plane f is read for are the first counts[s, f].
    counts = jnp.sum(level > f, axis=-1)
    key = (num_planes - level[:, 0]) * layout.GROUP + jnp.arange(layout.GROUP)
    order = jnp.sort(key) % layout.GROUP
    terms = jnp.where(level > f, x * 4.0**-f, 0)
    terms = jnp.take_along_axis(terms, order[:, None], axis=-1)
    channels = order + jnp.arange(slices)[:, None] * layout.GROUP

    def add_slice(s, y):
        def add_plane(f, total):
            def add_channel(i, total):
                row = jax.lax.dynamic_slice(planes, (f, channels[s, i], 0), (1, 1, words))[0, 0]
                return total + codes.unpack_digit_major(row).astype(jnp.float32) * terms[s, f, i]

            return jax.lax.fori_loop(0, counts[s, f], add_channel, total)

        # What the digits' mean takes from every term is the same for all outputs.
        total = jnp.full((layout.WORD_DIGITS, words), -codes.DIGIT_MEAN * jnp.sum(terms[s]))
        return y + jax.lax.fori_loop(0, num_planes, add_plane, total).reshape(-1) * scales[s]

    return jax.lax.fori_loop(0, slices, add_slice, jnp.zeros(outputs, jnp.float32))


def _dense(x, level, planes, scales):
    """``x, level [rows, K]``, ``scales [S, N]`` -> ``y [rows, N]``, outputs digit by digit."""
    rows, num_planes, slices, outputs = len(x), len(planes), *scales.shape
    f = jnp.arange(num_planes)[:, None]
    terms = jnp.where(level[:, None] > f, x[:, None] * 4.0**-f, 0)
    terms = terms.reshape(rows, num_planes, slices, layout.GROUP).transpose(2, 0, 1, 3)

    def add_slice(y, slice_):
        terms, s, scale = slice_
        words = jax.lax.dynamic_slice_in_dim(planes, s * layout.GROUP, layout.GROUP, axis=1)
        digits = codes.unpack_digit_major(words) - codes.DIGIT_MEAN
        partial = jnp.dot(
            terms.reshape(rows, -1), digits.reshape(-1, outputs), precision=jax.lax.Precision.HIGHEST
        )
        return y + partial * scale, None

    y = jnp.zeros((rows, outputs), jnp.float32)
    y, _ = jax.lax.scan(add_slice, y, (terms, jnp.arange(slices), scales))
    return y
