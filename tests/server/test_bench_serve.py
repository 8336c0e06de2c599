"""The load generator: its figures, and runs against a server."""

import json

import pytest

from grinqh_jax.benchmarking.load import Measurement, summary
from grinqh_jax.cli import bench_serve


def test_figures_of_known_times():
    measured = [
        Measurement(0.0, (0.1, 0.2, 0.4), 5, 10, 3.0),
        Measurement(0.5, (0.3, 0.4), 3, 20, 4.0),
        Measurement(0.6, (), 0, 0, None, "status 429: full"),
    ]
    figures = summary(measured, 2.0)
    assert (figures["requests"], figures["failed"]) == (3, 1)
    assert figures["errors"] == {"status 429: full": 1}
    assert (figures["tokens_per_second"], figures["prompt_tokens_per_second"]) == (4.0, 15.0)
    assert figures["requests_per_second"] == 1.0
    assert figures["realised_bits"] == 3.5
    assert figures["time_to_first_event"]["p50"] == pytest.approx(200)
    assert figures["time_between_events"]["mean"] == pytest.approx(400 / 3)
    assert figures["time_between_events"]["p99"] == pytest.approx(198)
    assert figures["time_per_token"]["p50"] == pytest.approx((75 + 50) / 2)
    assert figures["request"]["p90"] == pytest.approx(400)
    assert figures["ends"] == pytest.approx([0.4, 0.9])
    nothing = summary(measured[2:], 1.0)
    assert nothing["request"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def run(server, capsys, *flags: str) -> tuple[int, str, str]:
    code = bench_serve.main(["--url", f"{server.url}/v1", "--max-tokens", "6", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_closed_and_an_open_loop(server, capsys, tmp_path):
    closed = run(server, capsys, "--requests", "12", "--prompt-tokens", "20", "--bits", "2", "--json")
    figures = json.loads(closed[1])
    assert (closed[0], figures["failed"], figures["requests"]) == (0, 0, 12)
    assert figures["tokens"] == 72  # stop tokens do not end the answers
    assert 1.5 < figures["realised_bits"] < 2.5
    assert figures["time_to_first_event"]["p50"] <= figures["request"]["p50"]
    prompts = tmp_path / "prompts"
    prompts.write_text('{"prompt": "The cat"}\n\nplain text\n')
    code, out, err = run(
        server, capsys, "--requests", "6", "--rate", "50", "--prompts", str(prompts), "--model", "tiny@full"
    )
    assert (code, err) == (0, "")
    assert out.startswith("6 requests, 0 failed, in ")
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == list(bench_serve.TIMES.values())


def test_failures_are_counted_and_wrong_flags_refused(server, capsys, tmp_path):
    code, out, err = run(server, capsys, "--requests", "3", "--prompt-tokens", "500")
    assert code == 1
    assert "3 requests, 3 failed" in out
    assert "3 requests failed: status 400: the prompt has 500 tokens" in err
    assert bench_serve.main(["--url", "ftp://x"]) == 2
    assert "is not a URL such as" in capsys.readouterr().err
    assert bench_serve.main(["--url", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert bench_serve.main(["--prompts", str(tmp_path / "none")]) == 2
    assert bench_serve.main(["--rate", "0"]) == 2
