"""A refitted model at full precision stays as close to the original as plain rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.calibration.text import read_calibration
from checkpoints_tools.convert import driver
from checkpoints_tools.convert.options import FITTED, Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax import checkpoint
from grinqh_jax.decoding.bits import FULL
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized_programs")]

MOST = 1.25
"""Largest divergence at full precision as a multiple of that of plain rounding."""


def test_full_precision_of_a_refitted_model_is_that_of_plain_rounding(shared, tmp_path):
    """The text is documentation; the calibration text has none."""
    model = shared / "models" / "qwen3-7m"
    source = open_checkpoint(model)
    calibration = read_calibration(source, [], 8192)
    text = (shared / "data" / "docs_test.txt").read_text(encoding="utf-8")
    tokens = np.array(Tokenizer.load(model).encode(text[:12000])[:2048])
    reference, kl = load_decoder(source, jnp.float32), {}
    for refit in (False, True):
        plan = make_plan(source, calibration, Options(gains=FITTED, refit=refit))
        assert bool(plan.refit) == refit
        converted = checkpoint.load(driver.convert(plan, tmp_path / f"refit-{refit}"))
        [result] = measure(
            converted.model, plan.targets, tokens, [FULL], sequence_length=512, reference=reference
        )
        kl[refit] = result.kl
    assert kl[True] < MOST * kl[False]
    assert kl[True] != kl[False]
