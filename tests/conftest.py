"""Settings and fixtures of all tests: compilation, workers, run-time checks of shapes, shared assets."""

# ruff: noqa: E402  JAX reads environment variables when it is imported

import importlib.metadata
import os
import shutil
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "jax"
LARGEST_CACHE_BYTES = 2**30
"""Size of about ten runs without a common program."""

HAS_OLD_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
"""Whether jaxlib still has its older emitters. They compile unoptimized programs in half the time, but
optimized programs in a third more, and these then run three times as long. jaxlib 0.12 does not know the
flag."""

ON_GPU = os.environ.get("JAX_PLATFORMS") != "cpu" and Path("/dev/nvidiactl").exists()


def prepared(cache: Path) -> bool:
    """Creates the directory of compiled programs, or empties a large one; returns whether it is usable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        if sum(entry.stat().st_size for entry in os.scandir(cache)) > LARGEST_CACHE_BYTES:
            shutil.rmtree(cache)
            cache.mkdir()
    except OSError:
        return False
    return True


# JAX and XLA read these variables when they are imported and when the first program is compiled. Subprocesses
# inherit them. Tests spend most of their time in compilations, so all processes of a run, and the next run,
# share compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and prepared(CACHE):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most programs run once, on tiny arrays, so optimizing them costs more than it saves. The fixture
# `optimized_programs` is for tests that run their programs for longer.
if not ON_GPU:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if HAS_OLD_EMITTERS:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import jaxtyping
import numpy as np
import pytest
from jax._src.interpreters import mlir

if not hasattr(mlir, "_create_ir_context"):
    # jax 0.10 and 0.11 create a context of MLIR for each program, which takes half of the time of a small
    # one. Later releases lower ten programs of a thread in one context.
    _create_context = mlir.make_ir_context
    _contexts = threading.local()

    def _reused_context():
        if not getattr(_contexts, "uses_left", 0):
            _contexts.context, _contexts.uses_left = _create_context(), 10
        _contexts.uses_left -= 1
        return _contexts.context

    mlir.make_ir_context = _reused_context

if HAS_OLD_EMITTERS and not ON_GPU:
    from jax._src import compiler

    _compile_options = compiler.get_compile_options

    def _compile_options_for_optimized_programs(*args, **options):
        if not jax.config.read("jax_disable_most_optimizations"):
            overrides = options.get("env_options_overrides") or {}
            options["env_options_overrides"] = {"xla_cpu_use_fusion_emitters": True} | overrides
        return _compile_options(*args, **options)

    compiler.get_compile_options = _compile_options_for_optimized_programs

# The hook below checks annotations, with jaxtyping's shapes and dtypes, at every call. It precedes the
# imports of the packages. A parameter that is annotated as an array takes a NumPy array too.
jaxtyping.Array = jax.Array | np.ndarray

# `tree_map` may put shapes, shardings or other objects into the fields of a pytree. With this mark jaxtyping
# does not check the constructor of a registered class; it still checks the methods.
_register_dataclass = jax.tree_util.register_dataclass


def _register_with_free_fields(cls, *args, **kwargs):
    cls.__no_type_check__ = True
    return _register_dataclass(cls, *args, **kwargs)


jax.tree_util.register_dataclass = _register_with_free_fields

# The hook would check a function within a function, too. Preparing its checks takes a millisecond at each
# call of the outer function.
_jaxtyped = jaxtyping.jaxtyped


def _check_unless_inner(*, typechecker):
    check = _jaxtyped(typechecker=typechecker)
    return lambda definition: definition if "<locals>" in definition.__qualname__ else check(definition)


jaxtyping.jaxtyped = _check_unless_inner

# Not listed: lane programs and command lines, which have no arrays; checkpoint.quantization and model.config,
# which validate the values of files themselves; hf, which accepts any object with a reader's methods.
jaxtyping.install_import_hook(
    [
        "checkpoints_tools.baselines",
        "checkpoints_tools.calibration",
        "checkpoints_tools.convert",
        "checkpoints_tools.quantizers",
        "checkpoints_tools.source.head",
        "checkpoints_tools.source.layer",
        "grinqh_jax.benchmarking.measure",
        "grinqh_jax.benchmarking.random_model",
        "grinqh_jax.checkpoint.checksums",
        "grinqh_jax.checkpoint.manifest",
        "grinqh_jax.checkpoint.reader",
        "grinqh_jax.checkpoint.writer",
        "grinqh_jax.decoding.batch",
        "grinqh_jax.decoding.dial",
        "grinqh_jax.decoding.engine",
        "grinqh_jax.decoding.generator",
        "grinqh_jax.decoding.prefill_buckets",
        "grinqh_jax.decoding.prompt_cache",
        "grinqh_jax.decoding.sampling",
        "grinqh_jax.decoding.statistics",
        "grinqh_jax.decoding.thresholds",
        "grinqh_jax.evaluation",
        "grinqh_jax.json_files",
        "grinqh_jax.model.apply",
        "grinqh_jax.model.attention",
        "grinqh_jax.model.cache",
        "grinqh_jax.model.decoder",
        "grinqh_jax.model.experts",
        "grinqh_jax.model.flat_model",
        "grinqh_jax.model.layer_spec",
        "grinqh_jax.model.linear",
        "grinqh_jax.model.norm",
        "grinqh_jax.model.output_projection",
        "grinqh_jax.model.rope",
        "grinqh_jax.model.stacks",
        "grinqh_jax.model.gated_mlp",
        "grinqh_jax.model.parameters",
        "grinqh_jax.serving",
        "pallas_kernels.activations",
        "pallas_kernels.codes",
        "pallas_kernels.expert_weights",
        "pallas_kernels.experts",
        "pallas_kernels.decode_attention.kernel",
        "pallas_kernels.decode_rows.kernel",
        "pallas_kernels.dequantization.kernel",
        "pallas_kernels.grading",
        "pallas_kernels.matvec.api",
        "pallas_kernels.matvec.mosaic_gpu.kernel",
        "pallas_kernels.matvec.reference",
        "pallas_kernels.matvec.xla",
        "pallas_kernels.weight",
    ],
    # As in PEP 484, a parameter that is annotated as float takes an int.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


pytest_plugins = ["byte_model", "character_model"]  # Fixtures with tiny checkpoints.

MOST_WORKERS = 4
"""Each takes 2 to 3 GB of memory."""

LONGEST_FILES = (
    "decoding/test_batch.py",
    "convert/test_convert.py",
    "convert/test_train_gains.py",
    "server/test_openai.py",
    "decoding/test_engine.py",
    "decoding/test_generator.py",
    "package/test_docs.py",
    "model/test_families.py",
    "decoding/test_prompt_cache.py",
    "baselines/test_reading.py",
    "benchmarking/test_benchmark.py",
    "evaluation/test_tasks.py",
    "pareto/test_pareto.py",
    "evaluation/test_perplexity.py",
    "convert/test_bundled_model.py",
)
"""Files that run first, longest first, so that all workers finish at about the same time."""

SERVER_TESTS = "tests/server/"
"""Beginning of the names of tests that send requests to a server process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the number of workers of ``-n auto``; 0 runs the tests in this process.

    Workers never share a file, so a single file needs none. They would compete for the memory of a GPU.
    """
    files = [Path(argument.partition("::")[0]) for argument in config.args]
    if ON_GPU or (len(set(files)) == 1 and files[0].is_file()):
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Returns the scheduler of ``--dist loadfile``, but with all files of ``SERVER_TESTS`` as one.

    They share a server process, and another worker would start another.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SERVER_TESTS if nodeid.startswith(SERVER_TESTS) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {str(ROOT / "tests" / file): rank for rank, file in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))


@pytest.fixture(scope="module")
def optimized_programs():
    """Compiles the programs of a module as they are compiled outside tests."""
    disabled = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # of what earlier modules compiled without optimizations
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory of models and texts too large for the repository: ``GRINQH_SHARED`` or ``../shared``.

    Without the directory, tests that use it are skipped; they fail where the environment variable ``CI`` is
    set.
    """
    path = Path(os.environ.get("GRINQH_SHARED") or Path(__file__).parents[2] / "shared")
    if path.is_dir():
        return path
    reason = f"no models and texts at {path}: set GRINQH_SHARED to their directory"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
