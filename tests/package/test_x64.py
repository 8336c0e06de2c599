"""With JAX_ENABLE_X64=1 all results are the same, and the caller keeps its 64-bit types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]

PROGRAM = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import grinqh_jax, pallas_kernels
from checkpoints_tools.calibration.text import Calibration
from checkpoints_tools.convert.driver import convert
from checkpoints_tools.convert.options import Options
from checkpoints_tools.convert.plan import make_plan
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.hf import open_checkpoint

graded, dense, out = map(Path, sys.argv[1:])
default = str(jnp.arange(3).dtype)
found = {"default": default, "texts": [], "dtypes": []}
generator = grinqh_jax.Generator.load(graded)
for options in ({"bits": 3.0}, {"bits": 3.0, "temperature": 1.0, "top_k": 50}, {"bits": "full"}):
    pieces = []
    for piece in generator.generate("abc", grinqh_jax.Request(max_tokens=20, **options)):
        pieces.append(piece)
        assert str(jnp.arange(3).dtype) == default
    found["texts"].append("".join(pieces))
tokens = np.arange(60) % 200
result = measure(generator.model, generator.targets, tokens, [3.0, "full"], sequence_length=20)
found["losses"] = [one.perplexity for one in result]
w = pallas_kernels.quantize(jnp.ones((256, 512), jnp.float32))
thresholds = jnp.array([0.1, 0.2, 0.5, 1.0], jnp.float32)
for matvec in (pallas_kernels.graded_matvec, jax.jit(pallas_kernels.graded_matvec)):
    found["dtypes"] += [str(a.dtype) for a in matvec(jnp.ones((2, 256), jnp.float32), w, thresholds)]
windows = np.random.default_rng(0).integers(2, 258, (4, 100)).astype(np.int32)
calibration = Calibration(windows=windows, other=windows, name="random")
plan = make_plan(open_checkpoint(dense), calibration, Options())
convert(plan, out)
manifest = json.loads((out / "manifest.json").read_text())
found["leaves"] = {name: leaf["checksum"] for name, leaf in manifest["leaves"].items()}
assert str(jnp.arange(3).dtype) == default
print(json.dumps(found))
"""


def run(command: list[str], x64: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])
    environment = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": x64}
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_program_with_64_bit_types_gets_the_same_results(graded_directory, dense_directory, tmp_path):
    results = []
    for x64 in ("0", "1"):
        out = tmp_path / f"out{x64}"
        done = run(["-c", PROGRAM, str(graded_directory), str(dense_directory), str(out)], x64)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert [one.pop("default") for one in results] == ["int32", "int64"]
    assert results[0]["dtypes"] == ["float32"] * 4
    assert results[0] == results[1]


@pytest.mark.parametrize("verb", [["generate", "-p", "abc", "-m", "8"], ["benchmark", "--json"]])
def test_the_command_line_works_with_64_bit_types(graded_directory, verb):
    done = run(["-m", "grinqh_jax", *verb, "--model", str(graded_directory)], "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout
