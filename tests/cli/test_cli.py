"""The command line: streams, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from command_lines import assert_refused, run, stdin

from grinqh_jax import __main__
from grinqh_jax.cli import command, generate
from grinqh_jax.errors import GrinqhWarning


@pytest.fixture(scope="module")
def graded_directory(one_layer_directory):
    return one_layer_directory


@pytest.fixture(scope="module")
def dense_directory(one_layer_dense_directory):
    return one_layer_dense_directory


def test_text_goes_to_stdout_and_statistics_to_stderr(capsys, graded_directory):
    result = run(capsys, generate.main, "--model", graded_directory, "-p", "ab", "-m", 8, "--bits", 3)
    assert result.code == 0
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [
        "prompt",
        "generation",
        "realised bits",
        "weights read per token",
        "peak memory",
    ]
    as_json = run(
        capsys, generate.main, "--model", graded_directory, "-p", "ab", "-m", 8, "--bits", 3, "--json"
    )
    fields = json.loads(as_json.out)
    assert result.out == fields["text"] + "\n"
    assert fields["bits"] == 3
    assert fields["prompt_tokens"] == 2
    assert fields["generated_tokens"] == 8
    assert 1 <= fields["realised_bits"] <= 8
    assert len(fields["realised_bits_per_layer"]) == 5
    assert [len(step) for step in fields["realised_bits_per_step"]] == [5] * 7
    assert fields["finish_reason"] in ("stop", "length")
    assert fields["bytes_per_token"] < fields["bytes_per_token_bf16"]


def test_a_prompt_from_standard_input_gives_the_same_text(capsys, monkeypatch, graded_directory):
    flags = ("--model", graded_directory, "-m", 6, "--temp", 1, "--seed", 4)
    given = run(capsys, generate.main, *flags, "-p", "Grüße\n")
    stdin(monkeypatch, "Grüße\n".encode())
    read = run(capsys, generate.main, *flags, "-p", "-")
    assert read.out == given.out
    assert read.code == given.code == 0


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (["--bits", "9"], ["--bits: 9 bits", "1 to 8"]),
        (["--bits", "0.5"], ["bits 0.5", "dial goes from 1 to 8"]),
        (["--bits", "nan"], ["'nan'", "neither a number nor full"]),
        (["--max-context", "500"], ["500", "128"]),
        (["-p", "x" * 200], ["the prompt has 200 tokens", "holds 128"]),
        (["--top-p", "0", "--temp", "-1"], ["--top-p is 0, expected 0.000001 to 1", "--temperature is -1"]),
        (["-n", "0"], ["--max-tokens is 0, expected 1 or more"]),
        (["-n", "9999999999"], ["--max-tokens is 9,999,999,999, expected 1 to 2,147,483,647"]),
        (["--system-prompt", "Be brief."], ["--system-prompt", "chat template"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["-m", "many"], ["--max-tokens: 'many' is not a whole number"]),
        (["--tmep", "1"], ["unknown flag --tmep; did you mean --temp?"]),
        (["-prompt", "x"], ["unknown flag -prompt; did you mean --prompt?"]),
        (["--n-predict", "5"], ["did you mean --max-tokens?"]),
        (["y"], ["the prompt is given twice"]),
        (["x", "y"], ["unexpected argument 'y'; put a prompt of several words in quotes"]),
        (["-p", "ab\udcff"], ["the prompt is not UTF-8", "0xff at offset 2"]),
        (["--stop", "\udcff"], ["--stop is not UTF-8", "0xff at offset 0"]),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, graded_directory, flags, texts):
    assert_refused(run(capsys, generate.main, "--model", graded_directory, "-p", "x", *flags), *texts)


def test_standard_input_must_be_utf8(capsys, monkeypatch, graded_directory):
    stdin(monkeypatch, b"abc\xe9")
    result = run(capsys, generate.main, "--model", graded_directory, "-p", "-")
    assert_refused(result, "standard input is not UTF-8: byte 0xe9 at offset 3")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["generate", "-p", "x", "-m", "2"], marks=pytest.mark.slow),
        pytest.param(["generate", "-p", "x", "-m", "2", "--json"], marks=pytest.mark.slow),
        ["generate", "--help"],
    ],
)
def test_a_full_device_is_one_line_on_stderr(graded_directory, arguments):
    model = [] if "--help" in arguments else ["--model", str(graded_directory)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "grinqh_jax", *arguments, *model],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            timeout=300,
        )
    assert result.returncode == 1
    assert result.stderr == "error: standard output: No space left on device\n"


@pytest.mark.filterwarnings("default:other")
def test_warnings_of_the_library_are_lines_on_stderr(capsys):
    def verb(args):
        warnings.warn("config.json ties two tensors that differ", GrinqhWarning, stacklevel=1)
        warnings.warn("other", RuntimeWarning, stacklevel=1)
        return 0

    assert command.run(verb, command.Parser(), []) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: config.json ties two tensors that differ"
    assert "RuntimeWarning: other" in others[0]


def test_a_prompt_is_an_argument_a_flag_or_standard_input(capsys, monkeypatch, graded_directory):
    flags = ("--model", graded_directory, "--max_tokens", 4, "--temperature", 0)
    texts = [run(capsys, generate.main, *flags, *prompt).out for prompt in (["ab"], ["-p", "ab"])]
    stdin(monkeypatch, b"ab")
    texts.append(run(capsys, generate.main, *flags).out)
    assert texts[0] == texts[1] == texts[2] != "\n"
    stdin(monkeypatch, b"")
    assert_refused(run(capsys, generate.main, *flags), "no prompt", "as an argument")


def test_a_gguf_file_is_named_with_its_remedy(capsys, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    for model in (file, tmp_path):
        result = run(capsys, generate.main, "--model", model, "x")
        assert_refused(result, f"{file} is a GGUF file", f"grinqh-jax convert --model {file} --out DIR")


def test_an_unquantized_model_needs_full_bits(capsys, dense_directory):
    flags = ("--model", dense_directory, "-p", "ab", "-m", 3)
    assert_refused(run(capsys, generate.main, *flags, "--bits", 3), "not quantized", "full", "convert")
    result = run(capsys, generate.main, *flags, "--bits", "full")
    assert result.code == 0
    assert "MB, all of them, unquantized in float32" in result.err
    assert "bf16" not in result.err  # float32 weights are no 200 % of bf16


def test_every_verb_is_listed_and_has_help(capsys, graded_directory):
    assert_refused(run(capsys, __main__.main), "no verb given", "generate")
    assert_refused(run(capsys, __main__.main, "dance"), "unknown verb 'dance'", "choose from generate")
    assert_refused(run(capsys, __main__.main, "genrate"), "unknown verb 'genrate'; did you mean generate?")
    assert_refused(run(capsys, __main__.main, "--model", "x"), "a verb comes first")
    listed = run(capsys, __main__.main, "--help").out
    for verb in __main__.VERBS:
        assert f"\n  {verb} " in listed
        helped = run(capsys, __main__.main, verb, "--help")
        assert helped.code == 0
        assert helped.out.startswith(f"usage: grinqh-jax {verb} ")
    assert run(capsys, __main__.main, "--version").out.startswith("grinqh-jax 0.")
    flags = ("--model", graded_directory, "-p", "ab", "-m", 2)
    assert run(capsys, __main__.main, "generate", *flags).code == 0


def test_the_echo_of_a_failed_write_is_not_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert command.guarded(lambda: 0) == 0
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "RuntimeError: another\n"


def test_a_bug_keeps_its_traceback(capsys):
    def broken(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.run(broken, command.Parser(prog="x"), [])


def test_ctrl_c_ends_the_text_and_prints_the_statistics(graded_directory):
    model = ["--model", str(graded_directory), "--bits", "full", "-m", "120", "--stop", "never"]
    code = (
        "import signal, sys, time, grinqh_jax.decoding.texts as t, grinqh_jax.cli.generate as g\n"
        # A shell ignores interrupts in background processes, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "advance, calls = t.Texts.advance, []\n"
        "def slow(self):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"  # after the first token and a chunk
        "        print('CHUNK', file=sys.stderr, flush=True)\n"
        "        time.sleep(30)\n"
        "    advance(self)\n"
        "t.Texts.advance = slow\n"
        f"sys.exit(g.main({['-p', 'x', *model]!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in child.stderr:
        if line.startswith("CHUNK"):
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted\n" in err
    assert "generation: 17 tokens" in err
    assert "Traceback" not in err
    assert out
