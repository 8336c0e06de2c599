"""Settings and fixtures of all tests: compilation, workers, run-time checks of shapes, shared assets."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import pytest

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
# Workers share the cores. A second thread of NumPy's products waits busily, which costs more than it saves.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most programs run once, on tiny arrays, so optimizing them costs more than it saves. The fixture
# `optimized_programs` is for tests that run their programs for longer.
if not ON_GPU:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # Dividing a program among threads that compile it takes 7 % more time of the processor.
    _flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if HAS_OLD_EMITTERS:
        _flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
else:
    # Workers share the GPU's memory. XLA's products are expected values here, and trying algorithms for one
    # takes up to 0.1 s an algorithm, longer than all else in a test.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

# JAX makes many small objects when it is imported and when it traces and lowers a program. With Python's
# thresholds, searches for garbage took a tenth of the processor time of a run.
gc.set_threshold(20_000, 20, 10)

pytest_plugins = [
    "byte_model",
    "character_model",
    "serving_engine",
    "trained_models",
]  # Fixtures with checkpoints.

MOST_MEMORY_MAPS = 8_000
"""Linux allows a process 65,530 (``vm.max_map_count``). Each compiled program of a CPU takes some, a slow
file of tests up to 43,000, and jaxlib crashes when it gets no more."""

MOST_WORKERS = 4
"""Each takes 2 to 3 GB of memory."""

LONGEST_FILES = (
    "decoding/test_texts_gpu.py",
    "pallas_kernels/lanes/test_back_ends.py",
    "pallas_kernels/decode_rows/test_decode_rows_gpu.py",
    "pallas_kernels/router/test_router_gpu.py",
    "pallas_kernels/decode_attention/test_decode_attention_gpu.py",
    "pallas_kernels/experts/test_experts_gpu.py",
    "pallas_kernels/matvec/test_matvec_gpu.py",
    "pallas_kernels/sampling/test_sampling_gpu.py",
    "pallas_kernels/matmul/test_matmul_gpu.py",
    "server/test_openai.py",
    "serving/test_engine_answers.py",
    "sharding/test_mesh.py",
    "convert/test_converted_models.py",
    "pallas_kernels/matvec/test_several_rows.py",
    "decoding/test_generator.py",
    "decoding/test_engine.py",
    "pallas_kernels/matmul/test_matmul_program.py",
    "decoding/test_texts.py",
    "benchmarking/test_benchmark.py",
    "package/test_docs.py",
    "pallas_kernels/matvec/test_graded_matvec.py",
    "decoding/test_prompt_cache.py",
    "decoding/speculation/test_speculation.py",
    "convert/test_mixtures.py",
    "source/test_gguf.py",
    "benchmarking/test_scripts.py",
    "model/test_decoder.py",
    "serving/test_fixed_states.py",
    "evaluation/test_perplexity.py",
    "calibration/test_sensitivity.py",
    "pallas_kernels/test_nested_codes.py",
    "pallas_kernels/decode_rows/test_step_lowering.py",
    "pallas_kernels/decode_attention/test_attention_layers.py",
    "model/test_families.py",
    "cli/test_cli.py",
    "decoding/test_reading_of_weights.py",
    "baselines/test_baselines.py",
    "pallas_kernels/sampling/test_sampling_program.py",
)
"""Files that run first, longest first, so that all workers finish at about the same time; the files of GPU
tests before the others."""

TOGETHER = {
    "tests/decoding/test_texts_gpu.py": "generator on a GPU",
    "tests/server/": "server process",
    "tests/serving/test_engine_": "engine",
    "tests/serving/test_grammar.py": "engine",
    "tests/serving/test_round.py": "engine",
}
"""Shared fixtures that take long to make, by the beginning of the names of tests. One worker runs all tests
of a fixture, one after the other."""


def _shared_fixture(nodeid: str) -> str | None:
    """Returns the fixture in ``TOGETHER`` of a test or a file."""
    return next((fixture for beginning, fixture in TOGETHER.items() if nodeid.startswith(beginning)), None)


def pytest_configure(config: pytest.Config) -> None:
    """Prepares JAX, but not in the process that starts the workers, because they wait for it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import prepare_jax  # noqa: F401


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
    """Returns the scheduler of ``--dist loadfile``, but with files of ``TOGETHER`` as one.

    Tests of a file for GPUs go to different workers. Each compiles a program or two, which takes seconds, and
    the workers share compiled programs in the cache.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if (fixture := _shared_fixture(nodeid)) is not None:
                return fixture
            return nodeid if "_gpu.py::" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


class PrintedFailures:
    """Prints each failure at once, so that a run that is cut off names it."""

    def __init__(self, reporter: pytest.TerminalReporter):
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr if crash is None else crash.message).partition("\n")[0]
            self._reporter.ensure_newline()
            self._reporter.write_line(f"FAILED {report.nodeid} ({report.when}): {reason}", red=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    if (reporter := plugins.get_plugin("terminalreporter")) and not hasattr(session.config, "workerinput"):
        plugins.register(PrintedFailures(reporter))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "gpu" not in config.option.markexpr:  # `-m slow` runs on any machine.
        for_gpus = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=for_gpus)
        items[:] = [item for item in items if item not in for_gpus]
    # Between two files of a fixture, ``few_memory_maps`` could free its programs.
    ranks: dict[str, int] = {}
    for rank, file in enumerate(LONGEST_FILES):
        ranks.setdefault(_shared_fixture(f"tests/{file}") or f"tests/{file}", rank)

    def rank_of(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return ranks.get(_shared_fixture(file) or file, len(LONGEST_FILES))

    items.sort(key=rank_of)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Excludes what was imported from searches for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps(request):
    """Frees programs after a module that leaves many memory maps, but not those of shared fixtures."""
    yield
    if _shared_fixture(request.node.nodeid) is not None:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimized_programs():
    """Compiles the programs of a module with most optimizations, which a long run repays."""
    import jax

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
