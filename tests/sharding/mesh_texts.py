"""Long texts and prompts on a mesh: levels and tokens as on one device.

``test_mesh`` runs this file in a process.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_models import SLOW, assert_close

import checkpoints_tools
from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.decoding.request import Request
from grinqh_jax.model.apply import Graded
from grinqh_jax.model.decoder import linear_names
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.model.partition import AXIS
from grinqh_jax.sharding.mesh import make_mesh
from grinqh_jax.sharding.program import on_mesh
from pallas_kernels import grading

TEXT = Path(checkpoints_tools.__file__).parent / "data" / "calibration.txt"


@pytest.fixture(scope="module")
def bundled():
    """Returns the bundled model on one device, and a function that returns it on several."""
    files = ModelFiles.open(BUNDLED_MODEL)

    def on(devices):
        return Generator.from_files(files, mesh=make_mesh(f"tp={devices}", files.config))

    return Generator.from_files(files), functools.cache(on)


def text_of(generator, tokens):
    return np.array(generator.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:tokens])


@SLOW
@pytest.mark.parametrize("devices", [2, 4])
def test_a_long_text_has_the_same_logits_and_levels(devices, bundled, optimized_programs):
    """512 tokens, teacher-forced: at full precision as one text, at 3 bits as windows of 16 tokens.

    Where an activation is within rounding of a threshold, a device may read another level. Every later level
    then depends on it, so windows are compared up to the first one.
    """
    one, cut = bundled[0], bundled[1](devices)
    models, tokens = [FlatModel(each.model) for each in (one, cut)], text_of(one, 512)
    full = {name: np.asarray(rows) for name, rows in one.dial("full").thresholds.by_name().items()}
    expected, actual = (recorded(model, tokens[None], full)[0] for model in models)
    assert_close(actual, expected)

    graded = {name: np.asarray(rows) for name, rows in one.dial(3.0).thresholds.by_name().items()}
    windows = tokens.reshape(32, 16)
    (expected, inputs), (actual, other_inputs) = (recorded(model, windows, graded) for model in models)
    equal_so_far = np.ones(windows.shape, bool)  # no level of an earlier layer differs up to this token
    for name in linear_names(one.model.config):
        x, other, limits = np.asarray(inputs[name]), np.asarray(other_inputs[name]), graded[name][0]
        levels, other_levels = (np.asarray(grading.levels(each, limits)) for each in (x, other))
        differing = levels != other_levels
        distance = np.abs(np.abs(x)[..., None] - limits).min(axis=-1)
        first = differing & equal_so_far[..., None]
        assert (distance[first] <= 1e-5 * np.abs(x).max()).all(), name
        equal_so_far &= ~np.maximum.accumulate(differing.any(axis=-1), axis=1)
    assert equal_so_far.mean() > 0.5
    assert_close(np.asarray(actual)[equal_so_far], np.asarray(expected)[equal_so_far])


@SLOW
@pytest.mark.parametrize(("devices", "bits", "most"), [(2, "full", 0), (4, "full", 0), (2, 3.0, 5)])
def test_twenty_prompts_get_the_same_greedy_texts(devices, bits, most, bundled, optimized_programs):
    """At 3 bits, a level that differs by rounding changes some texts (see above)."""
    one, cut = bundled[0], bundled[1](devices)
    request, different = Request(bits=bits, max_tokens=24, temperature=0.0), []
    for prompt in text_of(one, 400).reshape(20, 20).tolist():
        texts = ["".join(each.generate(prompt, request)) for each in (cut, one)]
        different += [texts] if texts[0] != texts[1] else []
    print(f"{len(different)} of 20 texts differ on {devices} devices at {bits} bits")
    assert len(different) <= most, different


class Recording(Graded):
    """Grades, and keeps the inputs of all layers, those of all devices together."""

    def __init__(self, thresholds):
        super().__init__(thresholds)
        self.inputs = {}

    def __call__(self, name, linear, x):
        whole, cut = x.array, linear.input_cut
        if cut is not None:
            parts = jax.lax.all_gather(whole, AXIS)
            spans = zip(parts, cut.offsets, cut.channels, strict=True)
            whole = jnp.concatenate([part[..., first : first + n] for part, first, n in spans], axis=-1)
        self.inputs[name] = whole
        return super().__call__(name, linear, x)


@jax.jit
@on_mesh
def recorded(model, tokens, thresholds):
    recording = Recording(thresholds)
    return model.module(tokens, recording), recording.inputs
