"""The attention kernel's lane program on the emulator against a float64 oracle, and its lowering."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import kernel
from pallas_kernels.decode_attention.merging import MergeRefs, merge_program
from pallas_kernels.decode_attention.place import THREADS, Refs, Shape
from pallas_kernels.decode_attention.program import attention_program
from pallas_kernels.lanes.emulator import NumpyInstructions

CASES = {  # shape, lengths
    "empty cache": (
        {"batch": 1, "kv_heads": 1, "group": 2, "head_dim": 128, "capacity": 64, "splits": 2, "eps": 1e-6},
        [0],
    ),
    "grouped": (
        {"batch": 1, "kv_heads": 2, "group": 4, "head_dim": 128, "capacity": 300, "splits": 3, "eps": 1e-6},
        [299],
    ),
    "batch, narrow heads, one full": (
        {"batch": 2, "kv_heads": 2, "group": 4, "head_dim": 64, "capacity": 96, "splits": 2, "eps": None},
        [96, 1],
    ),
    "odd group, several steps": (
        {"batch": 1, "kv_heads": 1, "group": 5, "head_dim": 128, "capacity": 300, "splits": 1, "eps": 1e-5},
        [290],
    ),
    "three and four steps a warp, two and three": (
        {"batch": 2, "kv_heads": 1, "group": 4, "head_dim": 128, "capacity": 400, "splits": 1, "eps": 1e-6},
        [390, 300],
    ),
    "largest group": (
        {"batch": 1, "kv_heads": 1, "group": 6, "head_dim": 64, "capacity": 400, "splits": 2, "eps": None},
        [270],
    ),
    "one head each": (
        {"batch": 1, "kv_heads": 2, "group": 1, "head_dim": 64, "capacity": 70, "splits": 4, "eps": 1e-6},
        [65],
    ),
}
PARTS = {"parts": 3, "stored_columns": 2048}


def inputs(shape: Shape, lengths):
    """Arrays as in ``decode_attention``; slots beyond the length hold huge numbers."""
    rng = np.random.default_rng(shape.capacity)

    def bfloat16(*size):
        return np.array(jnp.asarray(rng.standard_normal(size), jnp.bfloat16))

    angles = np.asarray(lengths)[:, None] * rng.uniform(0, 1, shape.head_dim // 2)
    cache = (shape.batch, shape.capacity, shape.kv_heads, shape.head_dim)
    keys, values = bfloat16(*cache), bfloat16(*cache)
    for b, length in enumerate(lengths):
        keys[b, length:] = values[b, length:] = 1e30
        keys[b, 0] = keys[b, 0] if length else 0  # position 0 is loaded, and must not count
        values[b, 0] = values[b, 0] if length else 0
    qkv = np.full((shape.parts, shape.batch, shape.stored_columns), np.nan, np.float32)
    row = (shape.group + 2) * shape.kv_heads * shape.head_dim
    qkv[:, :, :row] = rng.standard_normal((shape.parts, shape.batch, row)) / shape.parts**0.5
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
    """Float64, with projections, keys and queries rounded to bfloat16 where XLA's operations would."""

    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)

    def prepared(head, scale, b):
        head = head.astype(np.float64)
        if shape.eps is not None:
            head = rounded(head / np.sqrt(np.mean(head**2) + shape.eps) * scale.astype(np.float64))
        low, high = np.split(head, 2)
        return rounded(np.concatenate([low * cos[b] - high * sin[b], high * cos[b] + low * sin[b]]))

    outputs = np.zeros((shape.batch, shape.kv_heads * shape.group, shape.head_dim))
    keys, values = keys.copy(), values.copy()
    for b, length in enumerate(lengths):
        row = rounded(qkv[:, b, : (shape.group + 2) * shape.kv_heads * shape.head_dim].sum(0))
        queries, rest, _ = np.split(
            row.reshape(-1, shape.head_dim),
            [shape.group * shape.kv_heads, (shape.group + 2) * shape.kv_heads],
        )
        for h in range(shape.kv_heads):
            key, value = prepared(rest[h], k_scale, b), rest[shape.kv_heads + h].astype(np.float64)
            all_keys = np.vstack([keys[b, :length, h].astype(np.float64), key])
            all_values = np.vstack([values[b, :length, h].astype(np.float64), value])
            for i in range(h * shape.group, (h + 1) * shape.group):
                scores = all_keys @ prepared(queries[i], q_scale, b) / np.sqrt(shape.head_dim)
                weights = np.exp(scores - scores.max())
                outputs[b, i] = weights @ all_values / weights.sum()
            if length < shape.capacity:
                keys[b, length, h], values[b, length, h] = key, value
    return outputs.reshape(shape.batch, -1), keys, values


@pytest.mark.parametrize("case", CASES)
def test_programs_match_the_oracle(case):
    sizes, lengths = CASES[case]
    shape = Shape(**sizes, **PARTS)
    arrays = inputs(shape, lengths)
    expected, expected_keys, expected_values = oracle(shape, **arrays)
    isa = NumpyInstructions(blocks=shape.blocks, threads=THREADS, shared_bytes=shape.shared_bytes)
    part = (shape.batch, shape.kv_heads, shape.splits, shape.group)
    parts = [np.full((*part, last), np.nan, np.float32) for last in (shape.head_dim, 2)]
    refs = Refs(*(isa.array(a) for a in (*arrays.values(), *parts)), shared=None)
    attention_program(isa, shape, refs)
    isa.finish()
    merged = emulated_merge(shape, parts)
    np.testing.assert_allclose(merged, expected, atol=6e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(arrays["values"], expected_values)
    np.testing.assert_allclose(
        arrays["keys"].astype(np.float32), expected_keys.astype(np.float32), rtol=2**-7, atol=1e-6
    )


def emulated_merge(shape: Shape, parts):
    """What the second launch makes of them."""
    rows = kernel.merged_rows(shape)
    isa = NumpyInstructions(blocks=rows.blocks, threads=rows.threads, shared_bytes=rows.shared_bytes)
    values = np.full((rows.rows, rows.columns), np.nan, jnp.bfloat16)
    merge_program(isa, shape, rows, MergeRefs(*(isa.array(a) for a in (*parts, values)), shared=None))
    isa.finish()
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tokens": 2}, "one new token"),
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"head_dim": 80}, "heads of 64 or 128"),
        ({"heads": 16}, "query heads to a kv head"),
        ({}, "needs"),  # the device is a CPU, or jax too old
    ],
)
def test_says_why_not(sizes, reason):
    usual = {"tokens": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16}
    assert reason in kernel.supports(**usual | sizes)
