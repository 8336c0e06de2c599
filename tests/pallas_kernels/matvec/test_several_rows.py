"""The programs for several rows on the emulator: float64, and the bits of each row alone.

One multiplies pairs of bytes, the other one, without lists, a matrix of all rows.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from emulation import alone, emulate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from matvec_cases import Case, assert_agrees_with_oracle, draw_thresholds, draw_x

from pallas_kernels import Activations
from pallas_kernels.lanes.emulated_memory import EmulationError
from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.matvec.mosaic_gpu import BytePairs, Config, DenseRows, kernel, tuning


class Program(NamedTuple):
    """A program, as a field of ``Config``: its default, all values, and the largest number of rows."""

    field: str
    default: BytePairs | DenseRows
    values: st.SearchStrategy
    most_rows: int

    def config(self, **fields) -> Config:
        """A configuration with the default."""
        sizes = {"warpgroups": 1, "warps_per_group": 2, "ring_slots": 4, self.field: self.default}
        return Config(**sizes | fields)

    def cases(self) -> st.SearchStrategy[Case]:
        return st.builds(
            Case,
            in_features=st.integers(1, 600),
            out_features=st.integers(1, 600),
            rows=st.integers(1, self.most_rows),
            max_bits=st.sampled_from([2, 4, 6, 8]),
            dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
            activations=st.sampled_from(["gaussian", "outliers", "heavy", "zeros", "all-zero"]),
            config=st.builds(
                Config,
                warpgroups=st.sampled_from([1, 2]),
                warps_per_group=st.sampled_from([1, 2, 4]),
                ring_slots=st.just(4),
                **{self.field: self.values},
            ),
            seed=st.integers(0, 2**32 - 1),
        )


BYTE_PAIRS = Program(
    "byte_pairs", BytePairs(), st.builds(BytePairs, ring_slots=st.sampled_from([2, 4, 8])), most_rows=8
)
DENSE_ROWS = Program(
    "dense_rows",
    DenseRows(),
    st.builds(
        DenseRows,
        step_planes=st.sampled_from([1, 2, 4]),
        ring_slots=st.sampled_from([2, 4, 8]),
        warpgroups=st.booleans(),
        tiles=st.integers(1, 4),
        counting_ctas=st.integers(1, 4),
    ),
    most_rows=16,
)
BOTH = pytest.mark.parametrize("program", [BYTE_PAIRS, DENSE_ROWS], ids=lambda program: program.field)


def assert_agrees_with_the_row_alone(case: Case, row: int) -> None:
    """Checks all rows against the oracle, and the bits of one of them."""
    x, weight, thresholds = case.arrays()
    y, bits = emulate(x, weight, thresholds, case.config)
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)
    y_alone, bits_alone = alone(case, x, weight, thresholds, row)
    np.testing.assert_array_equal(y[row].view(np.int64), y_alone.view(np.int64))
    assert bits[row] == bits_alone


@BOTH
@given(data=st.data())
@examples(8, in_ci=125)
def test_agrees_with_float64_and_with_the_row_alone(program, data):
    case = data.draw(program.cases())
    assert_agrees_with_the_row_alone(case, data.draw(st.integers(0, case.rows - 1)))


@BOTH
@given(whole_tiles=st.integers(0, 1), pieces=st.integers(1, 7), data=st.data())
@examples(4, in_ci=60)
def test_a_last_tile_of_any_number_of_pieces(program, whole_tiles, pieces, data):
    case = data.draw(program.cases())
    sizes = {"in_features": case.in_features % 300 + 1, "out_features": 512 * whole_tiles + 64 * pieces}
    case = dataclasses.replace(case, **sizes)
    assert_agrees_with_the_row_alone(case, data.draw(st.integers(0, case.rows - 1)))


@pytest.mark.parametrize(
    "dense_rows", [DenseRows(), DenseRows(ring_slots=4, warpgroups=True, tiles=2)], ids=str
)
def test_more_than_two_tiles(dense_rows):
    """Some CTAs have several tiles, and the last tile of outputs is not whole."""
    config = DENSE_ROWS.config(dense_rows=dense_rows)
    case = Case(700, 2200, rows=11, dtype="bfloat16", activations="heavy", config=config)
    assert_agrees_with_the_row_alone(case, 9)


@pytest.mark.parametrize(
    ("instruction", "without", "message"),
    [
        ("publish_operands", lambda isa: None, "publish_operands first"),
        ("finish_warpgroup_multiply_add", lambda isa, sums: sums, "used before finish"),
    ],
)
def test_the_emulator_refuses_warpgroups_without_fence_or_wait(monkeypatch, instruction, without, message):
    monkeypatch.setattr(NumpyInstructions, instruction, without)
    config = DENSE_ROWS.config(dense_rows=DenseRows(warpgroups=True))
    x, weight, thresholds = Case(256, 128, rows=9, config=config).arrays()
    with pytest.raises(EmulationError, match=message):
        emulate(x, weight, thresholds, config)


@BOTH
@given(kind=st.sampled_from(["gaussian", "heavy", "all-zero"]), data=st.data())
@examples(4, in_ci=60)
def test_a_row_has_the_same_bits_in_any_company(program, kind, data):
    """The row moves to another place among other rows, in a batch of another size."""
    case, rows = data.draw(program.cases()), data.draw(st.integers(1, program.most_rows))
    x, weight, thresholds = case.arrays()
    rng = np.random.default_rng(case.seed)
    others = draw_x(rng, (rows, case.in_features), kind).astype(x.dtype)
    limits = draw_thresholds(rng, np.abs(others.astype(np.float32)), weight.num_planes)
    old, new = rng.integers(case.rows), rng.integers(rows)
    others[new], limits[new] = x[old], thresholds[old]
    y, bits = emulate(x, weight, thresholds, case.config)
    in_company, bits_in_company = emulate(others, weight, limits, case.config)
    np.testing.assert_array_equal(y[old].view(np.int64), in_company[new].view(np.int64))
    assert bits[old] == bits_in_company[new]


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_the_defaults_for_1_to_16_rows_give_a_row_the_same_bits(multiprocessors):
    """With one multiprocessor the program without lists is the default from 3 rows on, else from 5 on."""
    case = Case(512, 600, rows=16)
    x, weight, thresholds = case.arrays()
    programs, outputs = set(), []
    for rows in (1, 2, 3, 4, 5, 8, 9, 16):
        one_row = Config(warpgroups=1, warps_per_group=1, ring_slots=4)
        sizes = kernel.geometry_of(Activations.of(jnp.asarray(x[:rows])), weight, one_row)
        config = tuning.best_config(
            sizes, device_kind="NVIDIA H200", multiprocessors=multiprocessors, warpgroups=True
        )
        programs.add(((rows > 2) + (rows > 4), config.byte_pairs is None, config.dense_rows is None))
        outputs.append(emulate(x[:rows], weight, thresholds[:rows], config)[0])
    from_3 = (1, multiprocessors == 1, multiprocessors > 1)
    assert programs == {(0, True, True), (0, False, True), from_3, (2, True, False)}
    for y in outputs:
        np.testing.assert_array_equal(y.view(np.int64), outputs[-1][: len(y)].view(np.int64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("program", "rows"), [(BYTE_PAIRS, 4), (DENSE_ROWS, 6)], ids=["pairs", "dense"])
def test_nan_and_inf_reach_every_output_of_their_row_and_no_other(program, rows, bad):
    case = Case(300, 600, rows=rows, config=program.config())
    x, weight, thresholds = case.arrays()
    clean, _ = emulate(x, weight, thresholds, case.config)
    x[rows - 2, 200] = bad
    y, _ = emulate(x, weight, thresholds, case.config)
    assert not np.isfinite(y[rows - 2]).any()
    np.testing.assert_array_equal(np.delete(y, rows - 2, 0), np.delete(clean, rows - 2, 0))


@pytest.mark.parametrize(
    ("program", "rows", "compared", "count"),
    [
        *((BYTE_PAIRS, 3, (0, 1, 2), count) for count in (3, 33)),
        *((DENSE_ROWS, 10, (0, 7, 9), count) for count in (3, 16, 33)),
    ],
    ids=lambda value: value.field if isinstance(value, Program) else str(value),
)
def test_applies_the_factor_of_a_norm(program, rows, compared, count):
    case = Case(300, 600, rows=rows, config=program.config())
    x, weight, thresholds = case.arrays()
    squares = np.random.default_rng(count).uniform(0, 1, (rows, count)).astype(np.float32)
    y, bits = emulate(x, weight, thresholds, case.config, square_partials=squares, eps=0.25)
    assert not np.array_equal(bits, emulate(x, weight, thresholds, case.config)[1])
    for row in compared:
        y_alone, bits_alone = alone(case, x, weight, thresholds, row, square_partials=squares, eps=0.25)
        np.testing.assert_array_equal(y[row], y_alone)
        assert bits[row] == bits_alone


def assert_reads_channels(config: Config, reached: int) -> None:
    """Checks two rows, of which the second one reads ``reached`` channels of each group."""
    x, weight, _ = Case(512, 512, rows=2, config=config).arrays()
    x[:] = 0.5
    for group in np.split(x[1], 4):
        group[np.random.default_rng(reached).permutation(128)[:reached]] = 2
    thresholds = np.full((2, 4), np.inf, np.float32)
    thresholds[:, 0] = 1
    y, bits = emulate(x, weight, thresholds, config)
    np.testing.assert_allclose(bits, [0, 2 * reached / 128])
    assert_agrees_with_oracle(x, weight, thresholds, y, bits)


@pytest.mark.parametrize("reached", [0, 1, 15, 16, 17, 33, 128])
@pytest.mark.parametrize("slots", [2, 8])
def test_lists_of_any_length(reached, slots):
    """Lists of no entry, of whole steps, and of one entry more or less; K fills whole CTAs."""
    byte_pairs = BytePairs(ring_slots=slots)
    assert_reads_channels(BYTE_PAIRS.config(warps_per_group=1, byte_pairs=byte_pairs), reached)


@pytest.mark.parametrize("reached", [0, 1, 31, 32, 33, 128])
def test_any_number_of_channels_that_some_row_reads(reached):
    """The other plane rows are not copied: the ring holds noise there, or rows of earlier steps."""
    dense_rows = DenseRows(ring_slots=2, step_planes=1)
    assert_reads_channels(DENSE_ROWS.config(warps_per_group=1, dense_rows=dense_rows), reached)


@pytest.mark.parametrize(("program", "rows"), [(BYTE_PAIRS, 4), (DENSE_ROWS, 16)], ids=["pairs", "dense"])
def test_every_channel_at_the_highest_level(program, rows):
    config = program.config()
    x, weight, _ = Case(256, 512, rows=rows, config=config).arrays()
    thresholds = np.zeros((rows, 4), np.float32)
    assert_agrees_with_oracle(x, weight, thresholds, *emulate(x, weight, thresholds, config))
