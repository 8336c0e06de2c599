"""The bundled model is complete and documented, and its dial is accurate on unseen texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from grinqh_jax import BUNDLED_MODEL, checkpoint
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("optimized_programs")

ROOT = Path(__file__).parents[2]
TOKENS = 640
UNSEEN = {"law": ROOT / "LICENSE", "code": Path(__file__).with_name("test_convert.py")}


@pytest.fixture(scope="module")
def bundled():
    return checkpoint.load(BUNDLED_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("text", UNSEEN)
def test_realised_bits_are_those_asked_for_on_unseen_text(bundled, text):
    tokens = Tokenizer.load(BUNDLED_MODEL).encode(UNSEEN[text].read_text(encoding="utf-8"))[:TOKENS]
    targets = bundled.quantization.targets
    # Several windows, because the dial corrects its setting from window to window.
    results = measure(bundled.model, targets, np.array(tokens), [2.0, 3.0, 4.0], sequence_length=64)
    for result in results:
        assert abs(result.realised_bits - result.bits) < 0.1


def test_the_bundled_model_says_where_it_comes_from(bundled):
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "OpenStax" in card
    assert "python -m checkpoints_tools.convert --model ../shared/models/qwen3-7m" in card
    provenance = bundled.quantization.provenance
    assert provenance["calibration"]["text"] == "books_calib.txt"
    size = sum(file.stat().st_size for file in BUNDLED_MODEL.rglob("*") if file.is_file())
    assert size < 15e6
    assert json.loads((BUNDLED_MODEL / "generation_config.json").read_text())["eos_token_id"] == 0
