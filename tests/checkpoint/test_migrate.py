"""A checkpoint of version 1 becomes one of the present version, with the same weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_format import FormatReader
from tiny_checkpoint import leaves_of, unpack_version_1

from checkpoints_tools.migrate import __main__ as migrate
from grinqh_jax.checkpoint import load
from pallas_kernels import dequantize


@pytest.mark.parametrize("in_place", [False, True])
def test_a_migrated_checkpoint_has_the_same_weights_and_files(tmp_path, capsys, in_place):
    old = unpack_version_1(tmp_path)
    (old / "README.md").write_text("A card: checkpoint version 1.")
    before, reader = load(old), FormatReader(old)
    expected = {
        (name, level): reader.weight(name, level) for name in reader.linear_shapes() for level in (1, 2)
    }
    out = old if in_place else tmp_path / "out"
    flags = ["--model", str(old), "--out", str(out)] + ["--force"] * in_place
    assert migrate.main(flags) == 0
    assert f"{out}: format version 2" in capsys.readouterr().out
    after, reader = load(out), FormatReader(out)
    assert reader.quantization["version"] == 2
    assert reader.quantization["provenance"]["bits_per_weight_stored"] < 46.4
    old_leaves = leaves_of(before.model)
    for name, array in leaves_of(after.model).items():
        np.testing.assert_array_equal(array, old_leaves[name], err_msg=name)
    for (name, level), weight in expected.items():
        np.testing.assert_array_equal(reader.weight(name, level), weight)
        read = dequantize(after.model.linear(name).weight, level, dtype=jnp.float32)
        np.testing.assert_allclose(read, weight, rtol=2e-6)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert (out / "README.md").read_text() == "A card: checkpoint version 2."


def test_a_finished_checkpoint_is_replaced_only_when_asked(tmp_path, capsys):
    old = unpack_version_1(tmp_path)
    assert migrate.main(["--model", str(old), "--out", str(old)]) == 2
    assert "--force to replace it" in capsys.readouterr().err
    assert load(old).quantization.provenance["bits_per_weight_stored"] == 46.4
