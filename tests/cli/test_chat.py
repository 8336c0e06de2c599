"""The verb ``chat``: its conversation, its commands, its cache."""

import json

from command_lines import assert_refused, run, stdin

from grinqh_jax.cli import chat, conversation, generate
from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS


def test_a_system_prompt_must_be_utf8(capsys, chat_directory):
    flags = ("--model", chat_directory, "-p", "x", "--system-prompt", "ab\udce9")
    assert_refused(run(capsys, generate.main, *flags), "--system-prompt is not UTF-8: byte 0xe9 at offset 2")


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
    # Answers to ab and cd. They are random bytes, with newlines among them.
    assert result.err.count("the answer ended after 3 tokens, the limit of --max-tokens") == 2
    assert result.out.endswith("\n")
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
