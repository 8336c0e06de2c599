"""The command line: streams, exit codes, one-line errors."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from grinqh_jax import __main__
from grinqh_jax.cli import chat, command, conversation, generate, perplexity, reference
from grinqh_jax.decoding.engine import PREVIEW_TOKENS
from grinqh_jax.decoding.model_files import ModelFiles
from grinqh_jax.errors import GrinqhWarning


def run(capsys, main, *argv) -> SimpleNamespace:
    """Exit code, stdout and stderr of a verb that runs in this process."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as exit:  # raised by argparse
        code = exit.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def assert_refused(result, *texts: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert [text for text in texts if text not in result.err] == []


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
    assert len(fields["realised_bits_per_layer"]) == 9
    assert [len(step) for step in fields["realised_bits_per_step"]] == [9] * 7
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


def test_a_system_prompt_must_be_utf8(capsys, chat_directory):
    flags = ("--model", chat_directory, "-p", "x", "--system-prompt", "ab\udce9")
    assert_refused(run(capsys, generate.main, *flags), "--system-prompt is not UTF-8: byte 0xe9 at offset 2")


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


def test_settings_that_a_model_lacks_are_named_once(capsys, tmp_path, dense_directory):
    data = tmp_path / "data.txt"
    data.write_text("some text")
    flags = ("--model", dense_directory, "--data", data, "--bits", "2,3")
    result = run(capsys, perplexity.main, *flags)
    assert_refused(result, "bits 2, 3: ", "not quantized")
    assert result.err.count("not quantized") == 1


def test_perplexity_says_what_it_compares_with(capsys, tmp_path, graded_directory, dense_directory):
    data = tmp_path / "data.txt"
    data.write_text("some text to read")
    flags = ("--model", graded_directory, "--data", data, "--bits", "2,full", "--sequence-length", 16)
    result = run(capsys, perplexity.main, *flags)
    assert result.code == 0
    first, titles, *rows = result.out.splitlines()
    assert first.startswith(
        "compared with this checkpoint's own 8 bits, so errors of those bits do not show: "
    )
    assert first.endswith("name it with --reference DIR_OR_HUB_ID")
    assert titles.split()[0] == "bits"
    assert rows[1].split()[3:5] == ["1.0000", "0.00000"]  # ratio and KL of one window with itself
    result = run(capsys, perplexity.main, *flags, "--reference", dense_directory, "--json")
    results = [json.loads(line) for line in result.out.splitlines()]
    assert [fields["reference"] for fields in results] == [str(dense_directory)] * 2
    assert results[1]["kl"] > 0


def test_the_original_is_the_reference_while_it_exists(tmp_path, graded_directory, dense_directory):
    files = ModelFiles.open(graded_directory)

    def found(source, named=None):
        quantization = dataclasses.replace(files.quantization, provenance={"source": source})
        return reference.find_reference(dataclasses.replace(files, quantization=quantization), named)

    original = found(str(dense_directory))
    assert original.files.directory == dense_directory
    assert original.description.startswith(f"the original, {dense_directory}")
    assert found(str(dense_directory), named="self").files is None
    other = tmp_path / "other"
    shutil.copytree(dense_directory, other)
    config = json.loads((other / "config.json").read_text())
    one_layer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (other / "config.json").write_text(json.dumps(config | one_layer))
    for source, reason in (
        (str(tmp_path / "gone"), "the original is no longer at"),
        (str(other), "holds another model now"),
        (str(tmp_path), "the original cannot be read"),
        (None, "config.json does not say where the original is"),
    ):
        fallback = found(source)
        assert (fallback.files, fallback.name) == (None, "self")
        assert reason in fallback.description
    assert found(None, named=str(dense_directory)).files.directory == dense_directory


def test_an_unquantized_model_needs_full_bits(capsys, dense_directory):
    flags = ("--model", dense_directory, "-p", "ab", "-m", 3)
    assert_refused(run(capsys, generate.main, *flags, "--bits", 3), "not quantized", "full", "convert")
    result = run(capsys, generate.main, *flags, "--bits", "full")
    assert result.code == 0
    assert "MB, all of them, unquantized in float32" in result.err
    assert "bf16" not in result.err  # float32 weights are no 200 % of bf16


def test_chat_keeps_the_conversation(capsys, monkeypatch, chat_directory):
    seen = []
    monkeypatch.setattr(
        "grinqh_jax.text.tokenizer.Tokenizer.chat", lambda self, messages: seen.append([*messages]) or [5, 6]
    )
    stdin(monkeypatch, "first\n\nzwölf\n".encode())
    result = run(
        capsys, chat.main, "--stats", "--model", chat_directory, "-m", 4, "--system-prompt", "Be brief."
    )
    assert result.code == 0
    answers = [m["content"] for m in seen[1] if m["role"] == "assistant"]
    assert [m["content"] for m in seen[1] if m["role"] != "assistant"] == ["Be brief.", "first", "zwölf"]
    assert seen[0] == seen[1][:2]
    assert result.out.startswith(answers[0] + "\n")
    assert result.err.count("generation: ") == 2


def test_chat_does_not_read_earlier_turns_again(capsys, monkeypatch, chat_directory):
    stdin(monkeypatch, f"{'first ' * 10}\nsecond\n".encode())
    result = run(capsys, chat.main, "--stats", "--model", chat_directory, "-m", 4)
    prompts = [line for line in result.err.splitlines() if line.startswith("prompt: ")]
    first, second = (int(line.split()[1]) for line in prompts)
    assert "reused" not in prompts[0]
    assert f"({min(first, second - PREVIEW_TOKENS)} reused)" in prompts[1]


def test_the_chat_template_is_applied_unless_ignored(capsys, chat_directory):
    flags = ("--model", chat_directory, "-p", "ab", "-m", 2, "--json")
    templated = json.loads(run(capsys, generate.main, *flags).out)
    plain = json.loads(run(capsys, generate.main, *flags, "--ignore-chat-template").out)
    assert templated["prompt_tokens"] == len("?user: ab\n?assistant:")
    assert plain["prompt_tokens"] == 2


def test_chat_needs_a_template(capsys, graded_directory):
    assert_refused(run(capsys, chat.main, "--model", graded_directory), "no chat template")
    assert_refused(run(capsys, chat.main), "bundled qwen3-7m has no chat template", "grinqh-jax generate")
    assert_refused(run(capsys, chat.main, "--ignore-chat-template"), "unknown flag --ignore-chat-template")


def test_chat_goes_on_after_a_line_that_is_refused(capsys, monkeypatch, chat_directory):
    lines = [
        b"ab",
        b"\xff\xe9",
        b"/dance",
        b"/bits 9",
        b"/bits 2.5",
        b"x" * 200,
        b"cd",
        b"/stats",
        b"/exit",
        b"e",
    ]
    stdin(monkeypatch, b"\n".join(lines))
    result = run(capsys, chat.main, "--model", chat_directory, "-n", 3)
    assert result.code == 0
    assert len(result.out.splitlines()) == 2  # answers to ab and cd
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert [error.split(";")[0] for error in errors[:2]] == [
        "error: standard input is not UTF-8: byte 0xff at offset 0, line 2",
        "error: unknown command /dance",
    ]
    assert errors[2] == "error: /bits: 9 bits per weight: expected 1 to 8, or full"
    assert "the prompt has" in errors[3]
    assert len(errors) == 4
    assert "the next answer reads 2.5 bits per weight" in result.err
    assert result.err.count("the answer ended after 3 tokens, the limit of --max-tokens") == 2
    assert result.err.count("realised bits: ") == 1


def test_chat_commands_change_the_conversation(capsys, monkeypatch, chat_directory):
    seen = []
    monkeypatch.setattr(
        "grinqh_jax.text.tokenizer.Tokenizer.chat", lambda self, messages: seen.append([*messages]) or [5, 6]
    )
    stdin(monkeypatch, b"/help\n/stats\nfirst\n/system Be brief.\nsecond\n/reset\nthird\n/quit\n")
    result = run(capsys, chat.main, "--model", chat_directory, "-n", 2)
    assert result.code == 0
    assert [[m["content"] for m in messages if m["role"] != "assistant"] for messages in seen] == [
        ["first"],
        ["Be brief.", "first", "second"],
        ["Be brief.", "third"],
    ]
    for name in conversation.COMMANDS:
        assert f"  {name}" in result.err
    assert "no answer yet" in result.err


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
