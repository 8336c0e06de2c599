"""The lane programs of sampling on the emulator, against float64 and against the XLA path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_cases
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from sampling_cases import Case, oracle

from pallas_kernels.lanes.emulator import LaneValue, NumpyInstructions
from pallas_kernels.sampling import noise

LOGITS = ["gaussian", "flat", "peaked", "ties", "equal", "heavy", "far"]


def draw_logits(kind: str, vocabulary: int, rng) -> np.ndarray:
    normal = rng.standard_normal(vocabulary)
    logits = {
        "gaussian": normal * 3 + 5,
        "flat": normal * 0.01 - 20,
        "peaked": normal + 12 * (np.arange(vocabulary) < 7),
        "ties": np.round(normal),
        "equal": np.zeros(vocabulary),
        "heavy": np.clip(rng.standard_cauchy(vocabulary), -1000, 1000),
        "far": normal * 30,
    }[kind]
    return logits.astype(np.float32)


@st.composite
def rows(draw):
    """Draws up to three rows of one vocabulary with the same optional arrays."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary = draw(st.sampled_from([1, 2, 31, 127, 128, 129, 1000, 1025, 4097]))
    biased, penalized, masked = (draw(st.booleans()) for _ in range(3))
    cases = []
    for _ in range(draw(st.integers(1, 3))):
        allowed = rng.random(vocabulary) < rng.random()
        allowed[rng.integers(vocabulary)] = True
        case = Case(
            draw_logits(draw(st.sampled_from(LOGITS)), vocabulary, rng),
            temperature=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0, 3.0])),
            top_k=draw(st.sampled_from([0, 1, 2, 20, 64, 500, 10**9])),
            top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01, 0.999])),
            min_p=draw(st.sampled_from([0.0, 0.05, 0.9, 1.0])),
            seed=draw(st.integers(0, 2**32 - 1)),
            position=draw(st.integers(0, 2**31 - 1)),
        )
        if biased:
            case = dataclasses.replace(case, bias=rng.integers(-4, 4, vocabulary).astype(np.float32))
        if penalized:
            case = dataclasses.replace(
                case,
                penalties=(float(np.float32(1.3)), 0.5, 0.25),
                in_prompt=rng.random(vocabulary) < 0.2,
                generated=rng.integers(0, 3, vocabulary) * (rng.random(vocabulary) < 0.3),
            )
        if masked:
            case = dataclasses.replace(case, allowed=allowed)
        cases.append(case)
    return cases


@examples(12, in_ci=150)
@given(cases=rows(), reordered=st.booleans())
def test_chooses_the_oracle_s_token(cases, reordered):
    logits, order = np.array([case.logits for case in cases]), None
    if reordered:
        order = np.random.default_rng(1).permutation(logits.shape[1]).astype(np.int32)
    tokens = sampling_cases.emulate(
        logits if order is None else logits[:, order], sampling_cases.parameters(cases), order
    )
    for case, token in zip(cases, tokens.tolist(), strict=True):
        assert token in oracle(case)


def test_a_whole_vocabulary():
    rng = np.random.default_rng(0)
    settings = [(0.6, 20, 0.95, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.2, 0.0), (1.0, 64, 1.0, 0.0)]
    logits = (rng.standard_normal((4, 151_936)) * 3).astype(np.float32)
    cases = [Case(row, *setting, 7, 100) for row, setting in zip(logits, settings, strict=True)]
    tokens = sampling_cases.emulate(logits, sampling_cases.parameters(cases))
    for case, token in zip(cases, tokens.tolist(), strict=True):
        assert token in oracle(case)


@pytest.mark.parametrize("top_p", [0.6, 0.1, 0.001])
def test_top_p_rejects_likely_scores(top_p):
    """The distribution is flat, so the first candidates are rejected with probability 1 - top_p."""
    logits = (np.random.default_rng(4).standard_normal((8, 4097)) * 0.5).astype(np.float32)
    cases = [Case(row, 1.0, top_p=top_p, seed=i) for i, row in enumerate(logits)]
    first = [Case(row, 1.0, seed=i) for i, row in enumerate(logits)]
    assert sum(oracle(case) != oracle(other) for case, other in zip(cases, first, strict=True)) >= 2
    tokens = sampling_cases.emulate(logits, sampling_cases.parameters(cases))
    for case, token in zip(cases, tokens.tolist(), strict=True):
        assert token in oracle(case)


@pytest.mark.parametrize("ties", [511, 512, 513, 3000])
@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_more_keys_reach_the_bound_than_the_list_holds(ties, top_p):
    rng = np.random.default_rng(ties)
    logits = (rng.standard_normal((2, 5000)) - 9).astype(np.float32)
    for row in logits:
        row[rng.permutation(5000)[:ties]] = 2.5
    cases = [Case(logits[0], 0.7, 20, top_p, seed=3), Case(logits[1], 0.0)]
    tokens = sampling_cases.emulate(logits, sampling_cases.parameters(cases))
    for case, token in zip(cases, tokens.tolist(), strict=True):
        assert token in oracle(case)


@pytest.mark.parametrize("top_k", [0, 20, 500])
def test_fewer_tokens_are_allowed_than_top_k_keeps(top_k):
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((6, 3000)).astype(np.float32)
    cases = []
    for i, row in enumerate(logits):
        allowed = np.zeros(3000, bool)
        allowed[rng.permutation(3000)[: 1 + i]] = True
        cases.append(Case(row, 1.0, top_k, 0.95, seed=i, allowed=allowed))
    tokens = sampling_cases.emulate(logits, sampling_cases.parameters(cases))
    for case, token in zip(cases, tokens.tolist(), strict=True):
        assert case.allowed[token]
        assert token in oracle(case)


def test_a_token_depends_on_its_row_alone():
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((3, 2500)) * 2).astype(np.float32)
    first = Case(logits[0], 0.9, 30, 0.9, 0.0, 5, 6)
    others = [Case(logits[1], 1.0, seed=1), Case(logits[2], 0.0, position=9)]

    def token(cases, row):
        arrays = np.array([case.logits for case in cases])
        return sampling_cases.emulate(arrays, sampling_cases.parameters(cases))[row]

    alone = token([first], 0)
    assert alone == token([first, *others], 0) == token([others[1], first], 1) == token([first] * 16, 15)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 20])
def test_nan_and_infinity_are_chosen(value, temperature, top_k):
    logits = np.random.default_rng(0).standard_normal((1, 600)).astype(np.float32)
    logits[0, [250, 400]] = value
    case = Case(logits[0], temperature, top_k)
    assert sampling_cases.emulate(logits, sampling_cases.parameters([case])) == [250]


def run(function, *arguments: np.ndarray) -> list[np.ndarray]:
    """Runs ``function(isa, *registers)`` for one number in each lane."""
    count = len(arguments[0])
    threads = -(-count // 32) * 32
    isa = NumpyInstructions(blocks=1, threads=threads, shared_bytes=4)
    registers = [
        LaneValue(np.resize(a, threads), "f32" if a.dtype == np.float32 else "i32") for a in arguments
    ]
    return [value.data[:count] for value in function(isa, *registers)]


def test_noise_equals_that_of_jax():
    indices = np.arange(3000, dtype=np.int32)
    for seed, position in ((0, 0), (2**32 - 1, 5), (77, 2**31 - 1)):

        def program(isa, index, seed=seed, position=position):
            key = noise.row_key(isa, isa.constant(seed), isa.constant(position))
            return [noise.gumbel(isa, key, index)]

        (ours,) = run(program, indices)
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), position)
        uniform = jax.random.uniform(key, (3000,), minval=np.finfo(np.float32).tiny)
        exact = -np.log(-np.log(np.asarray(uniform, np.float64)))
        np.testing.assert_allclose(ours, exact, rtol=3e-7, atol=3e-7)
        np.testing.assert_allclose(ours, jax.random.gumbel(key, (3000,)), rtol=1e-6, atol=1e-6)


def test_logarithms_are_accurate_up_to_one():
    rng = np.random.default_rng(0)
    near_one = 1 - np.arange(1, 2000) * 2.0**-24
    x = np.concatenate([near_one, rng.random(4000), 2.0 ** rng.uniform(-126, 127, 4000), [noise.TINY]])
    x = x.astype(np.float32)
    (ours,) = run(lambda isa, x: [noise.log(isa, x)], x)
    np.testing.assert_allclose(ours, np.log(x.astype(np.float64)), rtol=2e-7)


def test_noise_is_bounded():
    bounds = jnp.float32([noise.TINY, 1 - 2.0**-23])
    least, largest = -jnp.log(-jnp.log(bounds))
    assert noise.MIN_NOISE < least < largest < noise.MAX_NOISE
