"""The figures of an answer, which the server computes while the device decodes other answers."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.statistics import calibrated_ranges


def test_the_figures_of_an_answer_take_nothing_from_the_device(library_engine, monkeypatch):
    answer = library_engine.submit("The cat", Request(bits=2.5, max_tokens=12))
    answer.result(60)
    expected = answer.statistics().to_json()
    assert expected["activation_range_ratio"]
    # On a CPU JAX lets the host read every array of the device, so a transfer guard alone finds nothing.
    structure, arrays = nnx.split(answer._model)
    arrays = jax.tree.map(jnp.copy, arrays)
    model = nnx.merge(structure, arrays)
    for array in jax.tree.leaves(arrays):
        array.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        calibrated_ranges(model)
    monkeypatch.setattr(answer, "_model", model)
    with jax.transfer_guard("disallow"):
        found = answer.statistics().to_json()
    assert found | {"peak_memory_bytes": 0} == expected | {"peak_memory_bytes": 0}
