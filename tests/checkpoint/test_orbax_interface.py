"""The functions and options of the experimental interface of Orbax that ``grinqh_jax.checkpoint`` uses.

Orbax may change ``orbax.checkpoint.experimental.v1`` in any release. These tests then fail with a message
that says what to do.
"""

import importlib.metadata
import inspect
import json

import numpy as np
import pytest

REMEDY = (
    "orbax-checkpoint {version}: {what}. The experimental interface has moved: install the series that "
    "pyproject.toml allows (pip install 'orbax-checkpoint>=0.12.4,<0.13'), or adapt reader.py and parts.py "
    "in grinqh_jax/checkpoint to the new interface, run tests/checkpoint, raise the bound in pyproject.toml"
)


def moved(what: str) -> str:
    """Returns the message of a failure: what has changed, and the remedy."""
    return REMEDY.format(version=importlib.metadata.version("orbax-checkpoint"), what=what)


@pytest.fixture
def ocp():
    try:
        import orbax.checkpoint.experimental.v1 as ocp
    except ImportError as error:
        pytest.fail(moved(f"orbax.checkpoint.experimental.v1 cannot be imported ({error})"))
    return ocp


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        ("load", 2, set()),
        ("partial.save", 2, {"custom_metadata"}),
        ("partial.finalize", 1, set()),
    ],
)
def test_functions_take_the_arguments_that_we_pass(ocp, function, positional, keywords):
    found = ocp
    for name in function.split("."):
        found = getattr(found, name, None)
    assert callable(found), moved(f"there is no function {function}")
    try:
        inspect.signature(found).bind(*range(positional), **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(moved(f"{function} {error}"))


@pytest.mark.parametrize(
    "option",
    [
        "pytree.loading.partial_load",
        "array.saving.use_zarr3",
        "array.saving.use_compression",
        "memory.read_concurrent_bytes",
    ],
)
def test_a_context_has_the_options_that_we_set(ocp, option):
    # Setting an attribute that does not exist would not fail, so this checks that it exists.
    found = ocp.Context()
    for name in option.split("."):
        assert hasattr(found, name), moved(f"Context has no option {option}")
        found = getattr(found, name)


def test_partial_saves_leave_the_files_that_we_look_for(ocp, tmp_path):
    ocp.partial.save(tmp_path / "parts", {"a": {"b": np.arange(3)}}, custom_metadata={"part": "one"})
    files = list((tmp_path / "parts.partial_save").glob("*/_CHECKPOINT_METADATA"))
    assert len(files) == 1, moved("partial.save writes no parts.partial_save/*/_CHECKPOINT_METADATA")
    metadata = json.loads(files[0].read_text())
    assert metadata.get("custom_metadata") == {"part": "one"}, moved("custom_metadata is stored elsewhere")

    ocp.partial.save(tmp_path / "parts", {"c": np.ones(2)}, custom_metadata={"part": "two"})
    ocp.partial.finalize(tmp_path / "parts")
    assert (tmp_path / "parts" / "state").is_dir(), moved("partial.finalize writes no directory state/")
    with ocp.Context():
        tree = ocp.load(tmp_path / "parts")
    assert sorted(tree) == ["a", "c"], moved("partial.finalize does not merge the parts")
    np.testing.assert_array_equal(tree["a"]["b"], [0, 1, 2])
