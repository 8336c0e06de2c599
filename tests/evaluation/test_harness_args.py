"""Arguments of lm-evaluation-harness are used, ignored on purpose, or refused in one line."""

import jax.numpy as jnp
import pytest

from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation import harness_args


def test_arguments_that_the_harness_passes_are_ignored():
    harness_args.check({"device": "cuda:0", "max_batch_size": None, "trust_remote_code": True})


def test_unknown_arguments_are_named():
    with pytest.raises(UsageError, match=r"unknown model_args bit, parallelize \(known: pretrained, bits, "):
        harness_args.check({"parallelize": True, "bit": 3, "device": None})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", None), ("bfloat16", jnp.bfloat16), ("float32", jnp.float32), ("torch.bfloat16", jnp.bfloat16)],
)
def test_dtypes_that_the_decoder_computes_in_are_accepted(dtype, expected):
    assert harness_args.compute_dtype(dtype) is expected


@pytest.mark.parametrize("dtype", ["float16", "int8", None, 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match=f"dtype {dtype}: expected auto, float32, bfloat16"):
        harness_args.compute_dtype(dtype)
