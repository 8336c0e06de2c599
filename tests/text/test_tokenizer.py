"""The tokenizer gives the tokens of transformers, and text in whole characters."""

import random
import threading
import time

import pytest

import grinqh_jax
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello world",
    "  two  spaces\n\nand 12345 digits\t",
    "Grüße, 日本語 🎉 \u0301e",
    "<|endoftext|>after<|end|>",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🎉"},
]


def transformers_tokenizer(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", ["qwen3-7m", "qwen3-32m"])
def test_same_tokens_as_transformers(shared, name):
    directory = shared / "models" / name
    ours, theirs = Tokenizer.load(directory), transformers_tokenizer(directory)
    texts = [*TEXTS, (shared / "data" / "books_test.txt").read_text()[:5000]]
    for text in texts:
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = Tokenizer.load(grinqh_jax.BUNDLED_MODEL)
    text, done, turns = "The old house, 3 boxes.\n" * 60_000, threading.Event(), []

    def wait() -> None:
        while not done.is_set():
            turns.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=wait)
    other.start()
    started = time.perf_counter()
    tokens = tokenizer.encode(text)
    ended = time.perf_counter()
    done.set()
    other.join()
    assert tokens[:9] == tokenizer.encode(text[:200])[:9]
    # With Python's lock held there is no turn between the first and the last moment.
    assert sum(started + 0.01 < turn < ended - 0.01 for turn in turns) > 5


def test_same_chat_as_transformers(chat_directory):
    ours = Tokenizer.load(chat_directory)
    expected = transformers_tokenizer(chat_directory).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert ours.has_chat_template
    assert ours.chat(MESSAGES) == expected
    # The tokenizer has one token for each byte, and special tokens for the turns.
    assert ours.decode(ours.chat(MESSAGES)) == "system: Be brief.\nuser: Grüße 🎉\nassistant:"
    assert ours.chat(MESSAGES).count(1) == 3


def test_a_chat_template_may_be_a_separate_file(graded_directory, chat_directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((graded_directory / name).read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.chat(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match="the chat template fails: no system turn"):
        tokenizer.chat(MESSAGES)


def test_stream_gives_whole_characters_and_all_of_them(graded_directory):
    tokenizer = Tokenizer.load(graded_directory)
    for seed in range(50):
        rng = random.Random(seed)
        tokens = [rng.randrange(258) for _ in range(40)] + tokenizer.encode("é日🎉"[: rng.randrange(4)])
        tokens += tokenizer.encode("日")[: rng.randrange(3)]  # may end inside a character
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in tokens] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(tokens)
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("é日")] == ["", "é", "", "", "日"]


def test_missing_and_damaged_tokenizers_are_refused(tmp_path):
    # For this directory transformers returns an empty tokenizer.
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(CheckpointError, match=r"has no tokenizer \(tokenizer\.json, "):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
