"""The lane programs of decode attention on the emulator, against a float64 oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.lane_context import THREADS, Refs, Shape
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.program import attention_program
from pallas_kernels.lanes.emulator import NumpyInstructions

CASES = {  # sizes, lengths
    "empty cache": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 2,
            "head_dim": 128,
            "capacity": 64,
            "splits": 2,
            "eps": 1e-6,
        },
        [0],
    ),
    "four heads per kv head": (
        {
            "batch": 1,
            "kv_heads": 2,
            "queries_per_kv": 4,
            "head_dim": 128,
            "capacity": 300,
            "splits": 3,
            "eps": 1e-6,
        },
        [299],
    ),
    "batch, narrow heads, one cache full": (
        {
            "batch": 2,
            "kv_heads": 2,
            "queries_per_kv": 4,
            "head_dim": 64,
            "capacity": 96,
            "splits": 2,
            "eps": None,
        },
        [96, 1],
    ),
    "odd number of heads, several steps": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 5,
            "head_dim": 128,
            "capacity": 300,
            "splits": 1,
            "eps": 1e-5,
        },
        [290],
    ),
    "two to four steps in each warp": (
        {
            "batch": 2,
            "kv_heads": 1,
            "queries_per_kv": 4,
            "head_dim": 128,
            "capacity": 400,
            "splits": 1,
            "eps": 1e-6,
        },
        [390, 300],
    ),
    "most heads per kv head": (
        {
            "batch": 1,
            "kv_heads": 1,
            "queries_per_kv": 6,
            "head_dim": 64,
            "capacity": 400,
            "splits": 2,
            "eps": None,
        },
        [270],
    ),
    "one head per kv head": (
        {
            "batch": 1,
            "kv_heads": 2,
            "queries_per_kv": 1,
            "head_dim": 64,
            "capacity": 70,
            "splits": 4,
            "eps": 1e-6,
        },
        [65],
    ),
}
STORED_SIZES = {"num_partials": 3, "stored_features": 2048}


def inputs(shape: Shape, lengths):
    """Returns the arrays of ``Refs``. Cache slots from the length on hold huge numbers."""
    rng = np.random.default_rng(shape.capacity)

    def bfloat16(*size):
        return np.array(jnp.asarray(rng.standard_normal(size), jnp.bfloat16))

    angles = np.asarray(lengths)[:, None] * rng.uniform(0, 1, shape.head_dim // 2)
    cache = (shape.batch, shape.capacity, shape.kv_heads, shape.head_dim)
    keys, values = bfloat16(*cache), bfloat16(*cache)
    for b, length in enumerate(lengths):
        keys[b, length:] = values[b, length:] = 1e30
        keys[b, 0] = keys[b, 0] if length else 0  # The kernel loads position 0 and must ignore it.
        values[b, 0] = values[b, 0] if length else 0
    qkv = np.full((shape.num_partials, shape.batch, shape.stored_features), np.nan, np.float32)
    row = (shape.queries_per_kv + 2) * shape.kv_heads * shape.head_dim
    qkv[:, :, :row] = rng.standard_normal((shape.num_partials, shape.batch, row)) / shape.num_partials**0.5
    return {
        "qkv": qkv,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "q_scale": bfloat16(shape.head_dim),
        "k_scale": bfloat16(shape.head_dim),
        "lengths": np.asarray(lengths, np.int32),
        "keys": keys,
        "values": values,
    }


def oracle(shape: Shape, qkv, cos, sin, q_scale, k_scale, lengths, keys, values):
    """Computes outputs and cache in float64, rounded to bfloat16 where XLA's operations round."""

    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)

    def normed_and_rotated(head, scale, b):
        head = head.astype(np.float64)
        if shape.eps is not None:
            head = rounded(head / np.sqrt(np.mean(head**2) + shape.eps) * scale.astype(np.float64))
        low, high = np.split(head, 2)
        return rounded(np.concatenate([low * cos[b] - high * sin[b], high * cos[b] + low * sin[b]]))

    outputs = np.zeros((shape.batch, shape.kv_heads * shape.queries_per_kv, shape.head_dim))
    keys, values = keys.copy(), values.copy()
    for b, length in enumerate(lengths):
        row = rounded(qkv[:, b, : (shape.queries_per_kv + 2) * shape.kv_heads * shape.head_dim].sum(0))
        queries, rest = np.split(row.reshape(-1, shape.head_dim), [shape.queries_per_kv * shape.kv_heads])
        for h in range(shape.kv_heads):
            key, value = normed_and_rotated(rest[h], k_scale, b), rest[shape.kv_heads + h].astype(np.float64)
            all_keys = np.vstack([keys[b, :length, h].astype(np.float64), key])
            all_values = np.vstack([values[b, :length, h].astype(np.float64), value])
            for i in range(h * shape.queries_per_kv, (h + 1) * shape.queries_per_kv):
                scores = all_keys @ normed_and_rotated(queries[i], q_scale, b) / np.sqrt(shape.head_dim)
                weights = np.exp(scores - scores.max())
                outputs[b, i] = weights @ all_values / weights.sum()
            if length < shape.capacity:
                keys[b, length, h], values[b, length, h] = key, value
    return outputs.reshape(shape.batch, -1), keys, values


@pytest.mark.parametrize("case", CASES)
def test_programs_match_the_oracle(case):
    sizes, lengths = CASES[case]
    shape = Shape(**sizes, **STORED_SIZES)
    arrays = inputs(shape, lengths)
    expected, expected_keys, expected_values = oracle(shape, **arrays)
    isa = NumpyInstructions(blocks=shape.blocks, threads=THREADS, shared_bytes=shape.shared_bytes)
    leading = (shape.batch, shape.kv_heads, shape.splits, shape.queries_per_kv)
    softmaxes = [np.full((*leading, last), np.nan, np.float32) for last in (shape.head_dim, 2)]
    refs = Refs(*(isa.array(a) for a in (*arrays.values(), *softmaxes)), shared=None)
    attention_program(isa, shape, refs)
    isa.finish()
    merged = emulated_merge(shape, softmaxes)
    np.testing.assert_allclose(merged, expected, atol=6e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(arrays["values"], expected_values)
    np.testing.assert_allclose(
        arrays["keys"].astype(np.float32), expected_keys.astype(np.float32), rtol=2**-7, atol=1e-6
    )


def emulated_merge(shape: Shape, softmaxes):
    """Runs the second launch."""
    rows = kernel.merged_rows(shape)
    isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
    outputs = np.full((rows.rows, rows.features), np.nan, jnp.bfloat16)
    merge_program(isa, shape, rows, MergeRefs(*(isa.array(a) for a in (*softmaxes, outputs)), shared=None))
    isa.finish()
    return outputs.astype(np.float32)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tokens": 2}, "one new token"),
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"head_dim": 80}, "heads of 64 or 128"),
        ({"heads": 16}, "query heads for each kv head"),
        ({}, "needs"),  # The device is a CPU, or jax is too old.
    ],
)
def test_declines_with_a_reason(sizes, reason):
    supported = {"tokens": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16}
    assert reason in kernel.supports(**supported | sizes)
