"""The names that the package exports, and that it is cheap to import."""

import subprocess
import sys

import pytest

import grinqh_jax


def test_every_exported_name_is_there():
    from grinqh_jax.decoding.generator import Generator

    assert grinqh_jax.Generator is Generator
    assert sorted(grinqh_jax.__all__) == sorted(grinqh_jax._MODULES)
    assert all(hasattr(grinqh_jax, name) for name in grinqh_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generate_everything'"):
        _ = grinqh_jax.generate_everything


def test_flags_are_checked_before_jax_is_imported():
    code = (
        "import sys, grinqh_jax.__main__ as m\n"
        "for argv in (['generate', '--bits', 'x', '-p', 'a'], ['chat', '--help'], ['nothing']):\n"
        "    try: m.main(argv)\n"
        "    except SystemExit: pass\n"
        "print('jax' in sys.modules, file=sys.stderr)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.stderr.splitlines()[-1] == "False"
