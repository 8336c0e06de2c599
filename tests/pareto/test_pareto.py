"""Sweeps a tiny model: measurements, reuse, comparisons, messages and figures."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import tiny_models

from checkpoints_tools.baselines import model as baselines
from checkpoints_tools.convert.options import Options
from checkpoints_tools.pareto import __main__ as pareto
from checkpoints_tools.pareto import flags, paired
from checkpoints_tools.pareto.rows import Measurements
from checkpoints_tools.pareto.series import FIXED, SweepContext
from checkpoints_tools.pareto.timing import Timing
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.result import standard_error
from grinqh_jax.model.config import ModelConfig

CONFIG = tiny_models.hf_directories.QWEN3 | {"num_hidden_layers": 1, "hidden_size": 128}
SHAPES = ("128x128", "64x128", "128x192", "96x128")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra: eval) is not installed"
)


def timing_file(path, shapes=SHAPES):
    kernel = [
        {"shape": shape, "rows": rows, "bits": bits, "kernel_us": bits * rows}
        for shape in shapes
        for bits in (2, 3, 4, 8)
        for rows in (1, 2)
    ]
    bf16, int4 = dict.fromkeys(shapes, 20.0), dict.fromkeys(shapes, 5.0)
    content = {"device": "a GPU", "kernel": kernel, "xla_bf16_us": bf16, "torch_int4_us": int4}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pareto")
    tiny_models.write(directory / "tiny", CONFIG)
    tiny_models.text_file(directory / "calib.txt")
    (directory / "text.txt").write_text(tiny_models.TEXT[:620])
    problems = [{"question": f"{n} cats and {n}?", "answer": f"#### {2 * n}"} for n in (1, 2, 3)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in problems))
    timing_file(directory / "times.json")
    return directory


def arguments(files, *more):
    named = {
        "model": "tiny",
        "work": "work",
        "calib": "calib.txt",
        "data": "text.txt",
        "tasks": "sums.jsonl",
        "timing": "times.json",
    }
    common = [item for flag, name in named.items() for item in (f"--{flag}", str(files / name))]
    sizes = ["--calib-tokens", "512", "--sequence-length", "64", "--max-tokens", "4", "--batch", "2"]
    # The other methods compile slowly.
    methods = ["--methods", "rtn,skip-int4,truncation,whole-head,grinqh"]
    return [*common, *sizes, *methods, "--bits", "2,3", "--w-bits", "4", *more]


@pytest.fixture(scope="module")
def swept(files):
    """Exit code and results of a sweep of five methods, which takes a quarter of a minute."""
    more = ("--no-figure", "--sweep", "2:4:1", "--variant", "plain: --basis original", "--quantizer", "rtn")
    code = pareto.main(arguments(files, *more))
    return code, json.loads((files / "work" / "tiny" / "pareto.json").read_text())


def rows_of(results, **wanted):
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.slow
def test_every_method_is_measured_on_everything(swept):
    code, results = swept
    assert results["command"].startswith("python -m checkpoints_tools.pareto --model ")
    assert code == int(not all(sweep["never_rises"] for sweep in results["sweep"]))
    measured = {(row["label"], row["bits"]) for row in rows_of(results, measure="perplexity", shown=True)}
    fixed = {("RTN", 4)}
    labels = ("GRINQH", "GRINQH, whole head", "plain", "skip and int4 (TEAL)")
    graded = {(label, bits) for label in labels for bits in (2, 3)}
    truncated = {("truncation of the nested code", bits) for bits in (2, 4, 6, 8)}
    assert measured == {("full precision", "full")} | fixed | graded | truncated
    assert {(row["label"], row["bits"]) for row in rows_of(results, measure="accuracy")} == measured
    assert [(row["label"], row["bits"]) for row in rows_of(results, shown=False)] == [("GRINQH", 4.0)]
    assert [sweep["label"] for sweep in results["sweep"]] == ["GRINQH"]
    assert [step["to"] for step in results["sweep"][0]["steps"]] == [3, 4]


@pytest.mark.slow
def test_bits_read_include_scales_zero_points_and_the_head(swept):
    _, results = swept
    layers = 128 * 128 + 64 * 128 + 128 * 192 + 96 * 128
    head = 128 * 300
    for row in rows_of(results, measure="perplexity"):
        if row["method"] == "full":
            expected = (16, 16)
        elif row["method"] == "rtn":
            read = 4 + 20 / 128
            expected = (read, (read * layers + 16 * head) / (layers + head))
        else:
            expected = (row["realised_bits_without_head"] + 0.125, row["realised_bits"] + 0.125)
            means = "realised_bits_without_head" if row["method"] == "whole-head" else "realised_bits"
            assert row[means] == pytest.approx(row["bits"], abs=0.5), row["label"]
        assert (row["bits_read_layers"], row["bits_read_with_head"]) == pytest.approx(expected)
        whole_head = row["method"] in ("rtn", "whole-head")
        assert row["bits_read"] == pytest.approx(expected[0] if whole_head else expected[1])


@pytest.mark.slow
def test_rows_have_quality_and_standard_errors(swept):
    _, results = swept
    (full,) = rows_of(results, method="full", measure="perplexity")
    assert (full["kl"], full["difference"]) == pytest.approx((0, 0), abs=1e-6)
    for row in rows_of(results, measure="perplexity"):
        assert row["difference"] == pytest.approx(row["perplexity"] - full["perplexity"], abs=1e-3)
        assert row["stderr"] > 0
        assert "window_losses" not in row
    truncated = rows_of(results, method="truncation", measure="perplexity")
    assert [row["bits"] for row in truncated] == [2, 4, 6, 8]
    assert truncated[0]["kl"] > truncated[1]["kl"] > truncated[2]["kl"] > truncated[3]["kl"]
    (comparison,) = (
        c
        for c in results["comparisons"]
        if (c["label"], c["bits"], c["against"], c["against_bits"]) == ("GRINQH", 3, "RTN", 4)
    )
    (own,) = rows_of(results, label="GRINQH", bits=3.0, measure="perplexity")
    (other,) = rows_of(results, label="RTN", measure="perplexity")
    assert comparison["difference"] == pytest.approx(own["perplexity"] - other["perplexity"])
    assert comparison["difference_stderr"] > 0
    pairs = {(c["label"], c["against"]) for c in results["comparisons"]}
    assert {against for label, against in pairs if label == "GRINQH, whole head"} == {"RTN"}


@pytest.mark.slow
def test_kernel_times_follow_the_shapes(swept, files):
    _, results = swept
    assert (
        results["timing"]["what"] == "kernel time of a token's matvecs without the output projection, a GPU"
    )
    for row in results["rows"]:
        bits = row["realised_bits_without_head"]
        expected = {"full": 80, "rtn": 20}.get(row["method"])
        if expected is None and bits > 1.95:
            expected = pytest.approx(4 * max(bits, 2))
        assert row["kernel_us"] == expected, row["label"]
    config = ModelConfig.from_hf(CONFIG)
    other = Timing(timing_file(files / "other.json", ["64x64", "64x32"]), config)
    assert other.what == "kernel time of one layer of 64x64, 64x32, a GPU"
    graded = {"method": "grinqh", "bits": 2.5, "realised_bits_without_head": 2.5}
    assert other.us(graded) == pytest.approx(5)
    assert other.us(graded | {"realised_bits_without_head": 1.5}) is None  # Outside the measured range.
    assert other.us({"method": "gptq", "bits": 3}) is None
    (files / "broken.json").write_text('{"kernel": []}')
    with pytest.raises(UsageError, match=r"broken.json does not hold kernel times"):
        Timing(files / "broken.json", config)


@pytest.mark.slow
def test_a_second_sweep_reuses_checkpoints_and_rows(swept, files, monkeypatch, capsys):
    _, before = swept
    monkeypatch.setattr(Measurements, "_measure", lambda *_: pytest.fail("measured again"))
    for make in ("_convert", "_quantize"):
        monkeypatch.setattr(SweepContext, make, lambda *_: pytest.fail("made again"))
    pareto.main(arguments(files, "--no-figure", "--quantizer", "rtn"))
    results = json.loads((files / "work" / "tiny" / "pareto.json").read_text())
    kept = [row for row in before["rows"] if row["label"] != "plain" and row["shown"]]
    assert results["rows"] == kept
    assert "| GRINQH | 2 | " in capsys.readouterr().out
    assert pareto.main(arguments(files, "--no-figure", "--calib-tokens", "768")) == 2
    assert "with other options; name another --work" in capsys.readouterr().err


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.filterwarnings("default")
def test_figures_are_drawn_from_results(swept, files, tmp_path, capsys):
    results = files / "work" / "tiny" / "pareto.json"
    for name, magic in (("figure.png", b"\x89PNG"), ("figure.svg", b"<?xml")):
        assert pareto.main(["--draw", str(results), "--figure", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(magic)
    drawn = (tmp_path / "figure.svg").read_text()
    for label in ("GRINQH", "skip and int4 (TEAL)", "kernel time", "sums.jsonl", "KL divergence"):
        assert f"<!-- {label}" in drawn, label
    for refused in (["--draw", str(results)], arguments(files, "--work", str(tmp_path / "none"))):
        assert pareto.main([*refused, "--figure", str(tmp_path / "figure.xyz")]) == 2
        assert "figure.xyz: expected a suffix of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    for bad in ("{}", '{"title": "none", "rows": []}', '{"title": "other", "rows": [{"bits": 3}]}'):
        (tmp_path / "bad.json").write_text(bad)
        assert pareto.main(["--draw", str(tmp_path / "bad.json")]) == 2
        assert "bad.json: no results of this command" in capsys.readouterr().err


def test_a_missing_matplotlib_is_reported_before_any_work(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # Makes the import fail.
    assert pareto.main(arguments(files, "--bits", "2,full", "--work", str(tmp_path / "none"))) == 2
    assert not (tmp_path / "none").exists()
    error = capsys.readouterr().err
    assert "--bits full" in error
    assert "a figure needs matplotlib, which is not installed: pip install 'grinqh-jax[eval]'" in error
    assert "--no-figure" in error


def row(bits, losses, tokens):
    losses, tokens = np.asarray(losses), np.asarray(tokens, np.float64)
    perplexity = float(np.exp(losses.sum() / tokens.sum()))
    return {
        "bits": bits,
        "perplexity": perplexity,
        "stderr": perplexity * standard_error(losses, tokens),
        "window_losses": losses.tolist(),
        "window_tokens": tokens.tolist(),
    }


def test_a_rise_differs_from_noise():
    rng = np.random.default_rng(0)
    tokens = np.full(50, 60.0)
    text = tokens * rng.normal(3, 0.2, 50)  # Hard and easy windows, equal at every setting.
    noise = [tokens * rng.normal(0, 0.002, 50) for _ in range(3)]
    falls, same, rises = paired.steps(
        [
            row(2, text + 0.1 * tokens, tokens),
            row(3, text + noise[0], tokens),
            row(4, text + noise[1] + 0.004 * tokens, tokens),
            row(5, text + noise[2] + 0.2 * tokens, tokens),
        ]
    )
    assert falls["difference"] < 0
    assert not falls["rises_paired"]
    assert not same["rises"]
    assert same["rises_paired"]  # A rise of 0.4 % is real, though smaller than the text's own error.
    assert same["difference_stderr"] < 0.1 * same["stderr"]
    assert rises["rises"]
    assert rises["difference"] == pytest.approx(rises["perplexity"] * (1 - np.exp(-0.196)), rel=0.02)
    assert (rises["from"], rises["to"]) == (4, 5)


def test_mistakes_are_reported_before_any_work(files, capsys):
    for more, message in (
        (["--bits", "2,full"], "--bits full"),
        (["--methods", "rtn", "--sweep", "2:4:1"], "need grinqh among --methods"),
        (["--variant", "no colon"], "expected 'LABEL: FLAGS'"),
        (["--data", str(files / "none.txt")], "none.txt: No such file"),
        (["--tasks", str(files / "text.txt")], "text.txt: line 1: expected a JSON object"),
        (["--bits", "0.5,3"], "bits 0.5: the dial goes from 1 to 8"),
        (["--variant", "half: --max-bits 2"], "bits 3: the dial goes from 1 to 2 with --max-bits 2"),
        (["--json", str(files / "none" / "results.json")], "results.json: no such directory"),
    ):
        assert pareto.main(arguments(files, "--no-figure", *more)) == 2, more
        assert message in capsys.readouterr().err
    for more, message in (
        (["--quantizer", "none"], "invalid choice: 'none'"),
        (["--no-such-flag", "1"], "unknown flag --no-such-flag"),
        (["--variant", "other: --basis none"], "invalid choice: 'none'"),
        (["--methods", "gptq,best"], "best: choose from"),
        (["--sweep", "4:2:1"], "expected LOW:HIGH:STEP"),
        (["--w-bits", "5"], "expected some of 2,3,4,8"),
    ):
        with pytest.raises(SystemExit) as caught:
            pareto.main(arguments(files, "--no-figure", *more))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert pareto.main([]) == 2
    assert "--model is required; --work is required; give a text" in capsys.readouterr().err


def test_fixed_precision_methods_select_the_options_of_the_baselines():
    for method, (_, fields) in FIXED.items():
        options = baselines.Options(bits=3, **fields)
        assert options.method == method.removesuffix("-act-order")
        assert options.method in baselines.METHODS
        assert options.act_order == method.endswith("-act-order")


def test_flags_of_the_converter_become_its_options():
    assert flags.options([]) == Options()
    given = ["--max-bits", "4", "--quantizer", "rtn", "--basis", "original", "--split", "uniform"]
    given += ["--gains", "none", "--no-refit"]
    options = Options(max_bits=4, basis="original", split="uniform", gains="none", refit=False)
    assert flags.options(given) == options
    args = flags.parser().parse_args(["--variant", "four bits: --max-bits 4", "--split", "uniform"])
    assert flags.variants(args) == [("four bits", Options(max_bits=4))]
    assert flags.options(args.convert) == Options(split="uniform")


@pytest.mark.slow
def test_half_the_planes_give_half_the_settings(files, capsys):
    plain = ["--max-bits", "4", "--basis", "original", "--split", "uniform"]
    results = files / "half.json"
    more = ["--no-figure", "--methods", "truncation,grinqh", "--work", str(files / "half"), *plain]
    more += ["--json", str(results)]
    short = [item for item in arguments(files, *more, "--tokens", "130") if "sums" not in item]
    short.remove("--tasks")
    assert pareto.main(short) == 0
    truncated = rows_of(json.loads(results.read_text()), method="truncation", measure="perplexity")
    assert [row["bits"] for row in truncated] == [2, 4]
    assert pareto.main([*short, "--sweep", "2:6:2"]) == 2
    error = capsys.readouterr().err
    assert "bits 6: the dial goes from 1 to 4 with --max-bits 4 --basis original --split uniform" in error


def test_a_sweep_is_a_range():
    assert flags.parser().parse_args(["--sweep", "1.5:8:0.25"]).sweep == np.arange(1.5, 8.01, 0.25).tolist()
