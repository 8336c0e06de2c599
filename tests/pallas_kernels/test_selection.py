"""Selected outputs and channels of a nested weight have the values of the whole weight."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NestedWeight, dequantize, layout, quantize
from pallas_kernels.selection import PADDING, select_channels, select_outputs

RNG = np.random.default_rng(0)


def weight_of(k, n, max_bits=8):
    return quantize(RNG.standard_normal((k, n), np.float32), max_bits=max_bits)


def values_at(weight, level):
    return np.asarray(dequantize(weight, level))


@pytest.mark.parametrize(("n", "max_bits"), [(600, 8), (1100, 4), (100, 8)])
def test_outputs_in_any_order_keep_their_values_at_every_level(n, max_bits):
    weight = weight_of(200, n, max_bits)
    outputs = np.append(RNG.permutation(n)[: n // 2], [PADDING, 3, 3]).astype(np.int32)
    planes, scales = select_outputs(weight.planes, weight.scales, jnp.asarray(outputs))
    selected = NestedWeight(planes, scales, 200, len(outputs), weight.level_gains)
    selected.check()
    for level in range(1, max_bits // 2 + 1):
        expected = np.where(outputs == PADDING, 0, values_at(weight, level)[:, outputs])
        np.testing.assert_array_equal(values_at(selected, level), expected)


def test_the_selection_of_all_outputs_is_the_weight():
    weight = weight_of(128, 700)
    planes, scales = select_outputs(weight.planes, weight.scales, jnp.arange(700))
    np.testing.assert_array_equal(planes, weight.planes)
    np.testing.assert_array_equal(scales, weight.scales)


@pytest.mark.parametrize("before", [0, 64])
def test_channels_keep_their_values_and_their_places_in_groups(before):
    weight = weight_of(400, 70)
    channels = np.append([PADDING] * before, np.arange(128 + before, 400)).astype(np.int32)
    planes, scales = select_channels(weight.planes, weight.scales, jnp.asarray(channels))
    selected = NestedWeight(planes, scales, len(channels), 70, weight.level_gains)
    selected.check()
    for level in range(1, 5):
        np.testing.assert_array_equal(
            values_at(selected, level)[before:], values_at(weight, level)[128 + before :]
        )


def test_a_group_of_padding_is_0():
    weight = weight_of(128, 64)
    planes, scales = select_channels(weight.planes, weight.scales, jnp.full(130, PADDING))
    assert planes.shape == (4, 2 * layout.GROUP, 64 // layout.WORD_DIGITS)
    assert not np.asarray(planes).any()
    assert not np.asarray(scales).any()


def test_experts_are_selected_together():
    first, second = weight_of(256, 128), weight_of(256, 128)
    stacked = jnp.stack([first.planes, second.planes]), jnp.stack([first.scales, second.scales])
    for select, indices in ((select_outputs, np.arange(5, 90)), (select_channels, np.arange(128, 256))):
        planes, scales = select(*stacked, jnp.asarray(indices))
        for i, weight in enumerate((first, second)):
            alone = select(weight.planes, weight.scales, jnp.asarray(indices))
            np.testing.assert_array_equal(planes[i], alone[0])
            np.testing.assert_array_equal(scales[i], alone[1])
