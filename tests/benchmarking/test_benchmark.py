"""The verb ``benchmark``, the runs that it times, and the profile of a step."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_shapes import TINY, TINY_HF

from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.benchmarking.decode_run import DecodeRun
from grinqh_jax.cli import benchmark
from grinqh_jax.decoding import policy
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.engine.chunk import jitted_decode_chunk
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.thresholds import model_thresholds
from grinqh_jax.model.decoder import linear_shapes


@pytest.fixture(scope="module")
def tiny_model():
    return random_model.graded(TINY, compute_dtype=jnp.float32)


@pytest.fixture(scope="module")
def run(tiny_model):
    return DecodeRun(tiny_model, context=16, tokens=8)


def decode(run, bits):
    targets = jnp.asarray(random_model.TARGETS)
    return run.run(model_thresholds(run.model, targets, jnp.full(1, bits)))


@pytest.fixture(scope="module")
def long_run(tiny_model):
    return DecodeRun(tiny_model, context=16, tokens=64)


@pytest.mark.parametrize("bits", [2.0, 3.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_a_settled_run_reads_the_requested_bits(long_run, bits):
    figures = long_run.figures(long_run.run(long_run.settle(random_model.TARGETS, bits)))
    assert figures["realised_bits"] == pytest.approx(bits, abs=0.03)
    weights = sum(k * n for k, n in linear_shapes(TINY).values())
    assert figures["bytes_per_token"] > weights * figures["realised_bits"] / 8


def test_a_run_at_a_level_reads_it_whatever_the_dial(tiny_model):
    run = DecodeRun(tiny_model, context=16, tokens=4, batch=17)
    run.level = 3
    chunk = run.run(run.settle(random_model.TARGETS, 2.0))
    assert chunk.grading_stats.bits.shape[:2] == (4, 17)
    np.testing.assert_array_equal(chunk.grading_stats.bits, 6)
    assert run.figures(chunk)["realised_bits"] == pytest.approx(6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device_policy", "with_dial"),
    [
        pytest.param(policy.GPU, True, id="gpu"),
        pytest.param(policy.CPU, True, id="cpu"),
        pytest.param(policy.GPU, False, id="gpu, fixed thresholds"),
    ],
)
def test_a_run_of_chunks_decodes_what_one_call_of_all_steps_does(
    tiny_model, monkeypatch, device_policy, with_dial
):
    monkeypatch.setattr(policy.DecodePolicy, "for_device", lambda: device_policy)
    run = DecodeRun(tiny_model, context=16, tokens=60, batch=2)
    assert run.tokens == 64  # whole chunks
    dial = Dial.create(tiny_model, random_model.TARGETS, [2.5, 4.0])
    cache = jax.tree.map(jnp.copy, run._cache)  # A run donates it.
    decoded = run.run(dial if with_dial else dial.thresholds)
    chunk, _ = jitted_decode_chunk(
        tiny_model,
        jnp.arange(2, dtype=jnp.int32),
        jnp.zeros(2, bool),
        cache,
        dial if with_dial else dial.thresholds,
        Sampling.create(2),
        jnp.full(1, -1, jnp.int32),
        jnp.full(2, 64, jnp.int32),
        steps=64,
        policy=device_policy,
    )
    np.testing.assert_array_equal(decoded.tokens, chunk.tokens)
    np.testing.assert_array_equal(decoded.grading_stats.bits, chunk.grading_stats.bits)
    if with_dial:
        np.testing.assert_array_equal(decoded.dial.sums, chunk.dial.sums)
    again = run.run(
        dial if with_dial else dial.thresholds
    )  # with the keys and values that the first run left
    assert again.tokens.shape == (2, 64)


class FakeClock:
    """Stands in for the module ``time``: time passes only while somebody sleeps."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_warm_up_runs_are_not_timed(clock):
    pauses = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    timing = measure.timed(lambda: clock.sleep(next(pauses)), tokens=10, repeats=2)
    assert timing.seconds == pytest.approx((0.2, 0.1))
    assert next(pauses, None) is None


def test_runs_in_a_row_hide_the_time_of_the_host(clock):
    """The fake device takes 100 ms per run, and the fake host 50 ms to dispatch one."""
    idle_from = 0.0

    class Result:
        def __init__(self):
            nonlocal idle_from
            clock.sleep(0.05)
            self.ready = idle_from = max(idle_from, clock.now) + 0.1

        def block_until_ready(self):
            clock.now = max(clock.now, self.ready)

    assert measure.timed_in_a_row(Result, 10, 3, policy.CPU).seconds == pytest.approx([0.15] * 3)
    assert measure.timed_in_a_row(Result, 10, 3, policy.GPU).seconds == pytest.approx([0.1] * 3)


@pytest.mark.slow
def test_a_run_is_deterministic(run):
    np.testing.assert_array_equal(decode(run, 3.0).tokens, decode(run, 3.0).tokens)


@pytest.mark.slow
def test_prefill_in_buckets_gives_the_same_logits(tiny_model):
    whole = measure.PrefillRun(tiny_model, 32).run()
    pieces = measure.PrefillRun(tiny_model, 32, bucket=8).run()
    np.testing.assert_allclose(pieces, whole, atol=2e-3 * float(jnp.abs(whole).max()))
    with pytest.raises(ValueError, match="no multiple of the bucket"):
        measure.PrefillRun(tiny_model, 30, bucket=8)


@pytest.mark.slow
def test_the_verb_prints_a_row_per_test_and_setting(monkeypatch, capsys):
    monkeypatch.setattr(random_model, "shapes", lambda: {"tiny": TINY})
    monkeypatch.setattr(measure, "read_bandwidth", lambda: 1e9)
    flags = ["--shape", "tiny", "--bits", "3,full,bf16", "--repeats", "2"]
    assert benchmark.main([*flags, "--prompt-tokens", "16", "--generate-tokens", "8", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [("pp16", "full"), ("tg8", "3"), ("tg8", "full"), ("pp16", "bf16"), ("tg8", "bf16")]
    assert [(row["test"], row["bits"]) for row in rows] == expected
    three, full, bf16 = (row for row in rows if row["test"] == "tg8")
    assert full["realised_bits"] == pytest.approx(8, abs=1e-3)
    assert three["bytes_per_token"] < full["bytes_per_token"] < bf16["bytes_per_token"]
    moved = three["share_of_read_bandwidth"] * 1e9
    assert moved > three["bytes_per_token"] * three["tokens_per_second"] * 0.999

    flags = ["--shape", "tiny", "--bits", "full", "--repeats", "2"]
    assert benchmark.main([*flags, "--prompt-tokens", "0", "--generate-tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "tokens/s" in lines[0]
    assert "±" in lines[1]


def test_the_verb_says_why_bf16_is_faster():
    def row(bits, speed, test="tg8"):
        return {"test": test, "bits": bits, "tokens_per_second": speed, "share_of_read_bandwidth": 0.031}

    rows = [row("full", 1, "pp16"), row("2", 120.0), row("3", 90.0), row("4", 80.0), row("bf16", 100.0)]
    line = benchmark.why_bf16_is_faster(rows, None)
    assert line.startswith("bf16 is faster than 3, 4 bits because launches, not bytes, limit decoding here: ")
    assert "reading takes 3.1% of a step at 3 bits" in line
    assert "(needs an NVIDIA GPU)" in benchmark.why_bf16_is_faster(rows, "needs an NVIDIA GPU")
    assert benchmark.why_bf16_is_faster(rows[:2] + rows[-1:], None) is None
    assert benchmark.why_bf16_is_faster(rows[:4], None) is None


@pytest.mark.slow
def test_the_verb_takes_the_shape_of_a_model_in_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "read_bandwidth", lambda: 1e9)
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_HF))
    assert random_model.shape(str(directory)) == TINY  # The programs of the test above.
    flags = ["--prompt-tokens", "0", "--generate-tokens", "8", "--repeats", "1", "--json"]
    assert benchmark.main(["--shape", str(directory), "--bits", "3", *flags]) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (row["model"], row["test"]) == ("my-model", "tg8")
    assert benchmark.main(["--shape", "Qwen3-9B", *flags]) == 2
    assert "no shape is called 'Qwen3-9B'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "0.5"], "--bits 0.5: the dial of tiny goes from 1 to 8"),
        (["--bits", "9"], "--bits: 9 bits per weight: expected 1 to 8, or full"),
        (["--bits", "few"], "'few' is neither a number nor full"),
        (["--repeats", "0"], "--repeats: 0: expected 1 or more"),
    ],
)
def test_bad_flags_are_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(random_model, "shapes", lambda: {"tiny": TINY})
    monkeypatch.setattr(measure, "read_bandwidth", lambda: 1e9)
    try:
        code = benchmark.main(["--shape", "tiny", *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def step_profile():
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "step_profile.py"
    spec = importlib.util.spec_from_file_location("step_profile", path)
    module = sys.modules["step_profile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_profile_accounts_for_the_whole_span(step_profile):
    kernel = step_profile.Kernel
    kernels = []
    for start in (0.0, 100.0):
        kernels += [
            kernel("loop_add_fusion_1", start, 2.0),
            kernel("graded_matvec_kernel", start + 2, 10.0),
            kernel("add_norm_kernel", start + 12, 1.5),
            kernel("graded_matvec_kernel", start + 15, 30.0),
            kernel("MemcpyD2H", start + 45, 1.0),
        ]
    hlo = '  %loop_add_fusion.1 = f32[4] fusion(), metadata={op_name="jit(f)/while/body/norm/add"}\n'
    table = step_profile.tabulate(
        kernels, steps=2, hlo=hlo, linears=["layers.0.down", "lm_head.blocks.0"], span=50.0
    )
    assert table.categories["norm"] == (3.5, 2.0)
    assert table.categories["matvec"] == (10.0, 1.0)
    assert table.categories["head"] == (30.0, 1.0)
    assert table.categories["copies"] == (1.0, 1.0)
    assert table.categories["no kernel"] == (pytest.approx(5.5), 0.0)
    assert sum(time for time, _ in table.categories.values()) == pytest.approx(table.span)


def test_the_profile_separates_routers_from_graded_products(step_profile):
    kernel = step_profile.Kernel
    kernels = [
        kernel("gemvNSP_kernel", 0.0, 3.0),
        kernel("wrapped_exponential", 3.0, 2.0),
        kernel("loop_divide_fusion", 5.0, 1.0),
        kernel("graded_experts_kernel", 6.0, 5.0),
        kernel("graded_matvec_kernel", 11.0, 20.0),
    ]
    hlo = (
        '  %wrapped_exponential = f32[8] fusion(), metadata={op_name="jit(f)/experts/router/exp"}\n'
        '  %loop_divide_fusion = f32[8] fusion(), metadata={op_name="jit(f)/experts/div"}\n'
    )
    linears = ["layers.0.experts_down", "lm_head.blocks.0"]
    table = step_profile.tabulate(kernels, steps=1, hlo=hlo, linears=linears, span=31.0)
    times = {name: time for name, (time, _) in table.categories.items() if time}
    assert times == {"router": 5.0, "experts": 1.0, "matvec": 5.0, "head": 20.0}


def test_kernels_of_a_compiled_step_have_their_scopes(step_profile):
    run = DecodeRun(random_model.graded(TINY), context=0, tokens=8)  # the program of the verb in a test above
    run.run(run.settle(random_model.TARGETS, 3.0))
    scopes = set(step_profile.scopes_by_kernel(run.compiled.as_text()).values())
    assert {"norm", "attention", "mlp", "sampling", "embed"} <= scopes
    assert jax.default_backend() != "cpu" or not step_profile.trace(lambda: jnp.ones(3) + 1)
