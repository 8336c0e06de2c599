"""Word problems: extraction of the final answer, and answers of the bundled model."""

import json
from decimal import Decimal

import pytest

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.cli import evaluate as evaluate_command
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.tasks import evaluate, final_number, read_problems

pytestmark = pytest.mark.usefixtures("optimized_programs")

RECORDS = [
    {"question": "Ann has 3 cups and finds 4 more. How many cups has Ann?", "answer": "3+4=7.\n#### 7"},
    {"question": "Tom sells 2 of 9 hats. How many has he?", "answer": "That is 9-2=7.\n#### 7"},
    {"question": "There are 3 rows of 5 trees. How many trees?", "answer": "3*5=15\n#### 15"},
    {"question": "Ida had 1,000 pins and lost 1. How many?", "answer": "#### 999"},
    {"question": "Max has 12 books, Eva 4 more. How many has Eva?", "answer": "12+4=16\n#### 16"},
]


@pytest.fixture(scope="module")
def bundled():
    return Generator.load(BUNDLED_MODEL)


@pytest.fixture
def problem_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3+4=7 cups.\n#### 7\n", "7"),
        ("#### 7 #### 8", "7"),
        ("####$1,234.50.", "1234.5"),
        ("#### -3", "-3"),
        ("#### 7\nQuestion: and 9?", "7"),
        ("that makes 5, then 6.", "6"),
        ("that makes 5\nQuestion: and 9?", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_number_is_extracted(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_problems_are_read_and_bad_records_named(problem_file):
    problems = read_problems(problem_file)
    assert [problem.answer for problem in problems] == [7, 7, 15, 999, 16]
    assert problems[0].prompt == f"Question: {RECORDS[0]['question']}\nAnswer:"
    assert read_problems(problem_file, 2) == problems[:2]
    problem_file.write_bytes(b"\xef\xbb\xbf" + problem_file.read_bytes())
    assert read_problems(problem_file) == problems
    problem_file.write_text('{"question": "q", "answer": "7"}\n{"question": "q", "answer": "#### 7"}\n{}\n')
    with pytest.raises(UsageError, match="line 1, 3: expected"):
        read_problems(problem_file)
    problem_file.write_text("\n")
    with pytest.raises(UsageError, match="holds no problems"):
        read_problems(problem_file)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(bundled, problem_file, monkeypatch):
    problems = read_problems(problem_file)
    steps = []
    generate = Device.generate
    monkeypatch.setattr(Device, "generate", lambda *args: steps.append(1) or generate(*args))
    alone = evaluate(bundled, problems, 4.0, batch=1, max_tokens=64)
    steps.clear()
    together = evaluate(bundled, problems, 4.0, batch=3, max_tokens=64)
    assert len(steps) < 2 * 64 / 16, "rows are decoded after their answers are complete"
    assert together.accuracy == alone.accuracy
    assert together.realised_bits == pytest.approx(alone.realised_bits, abs=0.02)
    assert together.realised_bits == pytest.approx(4.0, abs=0.5)
    assert together.n == len(together.right) == len(problems)
    assert together.right == alone.right
    # The output projection has half of the bundled model's weights.
    assert 0.01 < abs(together.realised_bits_without_head - together.realised_bits) < 0.5


@pytest.mark.slow
def test_command_on_problems_that_the_model_solves(shared, capsys):
    flags = ["--tasks", str(shared / "data" / "arithmetic_test.jsonl"), "--limit", "6", "--batch", "3"]
    assert evaluate_command.main([*flags, "--max-tokens", "64", "--bits", "4,full", "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["bits"] for result in results] == [4.0, "full"]
    for result in results:
        assert result["accuracy"] >= 5 / 6
        assert result["n"] == 6
        assert result["stderr"] == pytest.approx((result["accuracy"] * (1 - result["accuracy"]) / 6) ** 0.5)
    assert results[1]["realised_bits"] == pytest.approx(8.0)


def test_command_refuses_bad_flags(problem_file, capsys):
    assert evaluate_command.main(["--tasks", str(problem_file), "--bits", "3,0.5"]) == 2
    assert "bits 0.5: this checkpoint's dial goes from 1 to 8" in capsys.readouterr().err
    for flags, problem in ((["--bits", "3,40"], "40 bits"), (["--limit", "0"], "0: expected 1 or more")):
        with pytest.raises(SystemExit) as caught:
            evaluate_command.main(["--tasks", str(problem_file), *flags])
        assert caught.value.code == 2
        assert problem in capsys.readouterr().err
