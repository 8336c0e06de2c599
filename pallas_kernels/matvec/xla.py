"""The graded matvec in XLA operations, for CPUs and for devices without a kernel.

Two programs compute the same sum (see ``NestedWeight``). With ``l_k`` the level of channel ``k``, and ``x_k``
its activation times the gain of that level, it is

    ``y_n = sum_g scales[g, n] sum_f sum_{k in group g, l_k > f} (x_k 4**-f) (d_f[k, n] - 1.5)``.

*By channel* serves the few rows of a decode step on a CPU. It adds the terms one by one: for each term it
unpacks one row of words, multiplies it and adds it. It does not touch rows of words that no level reaches, so
time and memory traffic are proportional to the realised bits, and it stores no dequantized weight.

*Dense* serves many rows and other devices. For each group it unpacks the digits of all planes into one
float32 matrix ``[P * 128, N]`` and multiplies it with the activations, masked by level for each plane.

Both use the order of ``layout.digit_major_positions`` and permute the outputs once, at the end.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import codes, grading, layout
from pallas_kernels.activations import Activations
from pallas_kernels.weight import NestedWeight

ROWS_BY_CHANNEL = 16
"""Largest number of rows that are computed by channel: those of a decode step or a verification. Each row is
computed by itself, so its result does not depend on the others. On two CPU cores, with a model of 6 layers
and width 256 at 3 bits, *by channel* takes 1.7 to 2.7 ms for each row and *dense* 23 to 27 ms for any small
number of rows, so both take equally long at about 10 rows."""


def supports(x, weight: NestedWeight) -> str | None:
    """Returns None, because XLA takes any number of rows on any device."""
    del x, weight
    return None


def partial_sums(
    x: Activations, weight: NestedWeight, thresholds: jax.Array
) -> tuple[Activations, grading.GradingStats]:
    """Implements ``api.graded_partial_sums`` for x ``[rows, K]``; returns one partial sum."""
    level = grading.levels(x.values, x.scale_thresholds(thresholds))
    stats = grading.stats(x, level)
    values, level = padded_terms(x, level, weight.level_gains, weight.planes.shape[1])
    positions = layout.digit_major_positions(weight.scales.shape[1])
    scales = weight.scales[:, positions.argsort()].astype(jnp.float32)
    arguments = (values, level, weight.planes, scales)
    if len(values) <= ROWS_BY_CHANNEL:
        y = jax.lax.platform_dependent(*arguments, cpu=_by_channel, default=dense)
    else:
        y = dense(*arguments)
    y = y[:, positions[: weight.out_features]] * x.factor()
    return Activations.of(y), stats


def padded_terms(
    x: Activations, level: jax.Array, level_gains: jax.Array | None, channels: int
) -> tuple[jax.Array, jax.Array]:
    """Returns x times the gains of its levels, float32, and the levels, padded to ``[rows, channels]``."""
    padding = ((0, 0), (0, channels - level.shape[1]))
    values = x.values.astype(jnp.float32) * grading.channel_gains(level, level_gains)
    return jnp.pad(values, padding), jnp.pad(level, padding)


def _by_channel(x, level, planes, scales):
    """Returns y ``[rows, N]``, digit-major, for x and level ``[rows, K]`` and scales ``[G, N]``."""
    return jax.lax.map(lambda row: one_row(row[0], row[1], planes[None], 0, scales), (x, level))


def one_row(x, level, planes, expert, scales):
    """Returns y ``[N]``, digit-major, of one row by channel.

    Args:
      x, level: See ``padded_terms``, ``[K]``.
      planes: Planes of all experts, ``[E, P, K, words]``.
      expert: Expert whose planes are read.
      scales: Its scales, digit-major float32 ``[G, N]``.
    """
    _, num_planes, _, words = planes.shape
    groups, outputs = scales.shape
    x, level = x.reshape(groups, 1, -1), level.reshape(groups, 1, -1)
    f = jnp.arange(num_planes)[:, None]
    # The channels of each group are sorted by descending level, so the first counts[g, f] of them read plane
    # f.
    counts = jnp.sum(level > f, axis=-1)
    key = (num_planes - level[:, 0]) * layout.GROUP + jnp.arange(layout.GROUP)
    order = jnp.sort(key) % layout.GROUP
    terms = jnp.where(level > f, x * 4.0**-f, 0)
    terms = jnp.take_along_axis(terms, order[:, None], axis=-1)
    channels = order + jnp.arange(groups)[:, None] * layout.GROUP

    def add_group(g, y):
        def add_plane(f, total):
            def add_channel(i, total):
                start = expert, f, channels[g, i], 0
                row = jax.lax.dynamic_slice(planes, start, (1, 1, 1, words))[0, 0, 0]
                return total + codes.unpack_digit_major(row).astype(jnp.float32) * terms[g, f, i]

            return jax.lax.fori_loop(0, counts[g, f], add_channel, total)

        # The mean of the digits contributes the same amount to every output.
        total = jnp.full((layout.WORD_DIGITS, words), -codes.DIGIT_MEAN * jnp.sum(terms[g]))
        return y + jax.lax.fori_loop(0, num_planes, add_plane, total).reshape(-1) * scales[g]

    return jax.lax.fori_loop(0, groups, add_group, jnp.zeros(outputs, jnp.float32))


def dense(x, level, planes, scales):
    """Returns y ``[rows, N]``, digit-major, for x and level ``[rows, K]`` and scales ``[G, N]``."""
    rows, num_planes = len(x), len(planes)
    groups, outputs = scales.shape
    f = jnp.arange(num_planes)[:, None]
    terms = jnp.where(level[:, None] > f, x[:, None] * 4.0**-f, 0)
    terms = terms.reshape(rows, num_planes, groups, layout.GROUP).transpose(2, 0, 1, 3)

    def add_group(y, group):
        terms, g, scale = group
        words = jax.lax.dynamic_slice_in_dim(planes, g * layout.GROUP, layout.GROUP, axis=1)
        digits = codes.unpack_digit_major(words) - codes.DIGIT_MEAN
        product = jnp.dot(
            terms.reshape(rows, -1), digits.reshape(-1, outputs), precision=jax.lax.Precision.HIGHEST
        )
        return y + product * scale, None

    y = jnp.zeros((rows, outputs), jnp.float32)
    y, _ = jax.lax.scan(add_group, y, (terms, jnp.arange(groups), scales))
    return y
