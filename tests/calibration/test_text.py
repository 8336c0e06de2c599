"""Calibration text: the windows, and how they are split."""

import re
import shutil

import byte_model
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from checkpoints_tools.calibration import text
from checkpoints_tools.calibration.text import BUNDLED, MIXED, SELF, read_calibration
from grinqh_jax.errors import GrinqhWarning, UsageError
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.text.tokenizer import Tokenizer


def encode(piece):
    """Encodes each letter as one token."""
    return [ord(letter) for letter in piece]


def test_windows_are_spread_over_the_whole_text():
    content = "".join(chr(32 + i // 100) for i in range(9000))
    windows = text.windows(content, encode, tokens=500, length=100)
    assert windows.shape == (5, 100)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows[:, 0], 32 + np.arange(5) * 18)


def test_a_short_text_gives_fewer_and_shorter_windows():
    assert text.windows("x" * 1900, encode, tokens=16384, length=100).shape == (3, 100)
    assert text.windows("x" * 300, encode, tokens=16384, length=1024).shape == (1, 300)
    assert text.windows("x" * 9000, encode, tokens=300, length=1024).shape == (1, 300)
    with pytest.raises(
        UsageError, match="255 tokens from 255 characters; give a text of at least 256 tokens"
    ):
        text.windows("x" * 255, encode, tokens=16384, length=1024)


def encode_runs(piece):
    """Encodes a run of up to 64 blanks as one token, as many tokenizers do, and each letter as one."""
    return [ord(run[0]) for run in re.findall(" {1,64}|[^ ]", piece)]


@pytest.mark.parametrize("start", [0, 40_000, 98_000, 199_999])
@pytest.mark.parametrize("blanks", [100, 20_000, 60_000])
def test_a_run_of_blanks_cuts_no_other_window(start, blanks):
    content = "abcdefghi " * 20_000
    content = content[:start] + " " * blanks + content[start:]
    windows = text.windows(content, encode_runs, tokens=32768, length=1024)
    assert windows.shape == (32, 1024)
    assert np.mean(windows == ord(" ")) < 0.15


def test_windows_that_replace_others_share_no_token():
    content = "".join(chr(256 + i) for i in range(30_000)) + " " * 10_000
    windows = text.windows(content, encode_runs, tokens=4000, length=200)
    letters = windows[windows != ord(" ")].tolist()
    assert windows.shape == (20, 200)
    assert len(letters) == len(set(letters))
    assert letters == sorted(letters)


def test_a_text_of_blanks_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="should yield 32768; remove runs of blanks"):
        text.windows("word " * 500 + " " * 500_000, encode_runs, tokens=32768, length=1024)


def test_one_short_span_shortens_no_other():
    content = "x" * 6000 + " " * 600  # 11 spans; each but the last yields 90 tokens, and the last 10
    windows = text.windows(content, lambda piece: encode_runs(piece)[:90], tokens=1100, length=100)
    assert windows.shape == (10, 90)


@pytest.mark.parametrize(
    ("windows", "first", "second"),
    [(1, [0], [0]), (2, [0], [1]), (3, [0, 1], [2]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])],
)
def test_the_two_sets_of_windows_share_no_token(windows, first, second):
    tokens = np.arange(windows * 10, dtype=np.int32).reshape(windows, 10)
    most, others = text.split_windows(tokens)
    assert (most[:, 0] // 10).tolist() == first
    assert (others[:, 0] // 10).tolist() == second
    assert most.shape[1] == others.shape[1] == (5 if windows == 1 else 10)
    assert not set(most.reshape(-1).tolist()) & set(others.reshape(-1).tolist())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_checkpoint(tiny_models.write(tmp_path_factory.mktemp("source") / "tiny"))


def file_of(path, letter, count):
    path.write_text(letter * count)
    return path


def test_several_texts_have_equal_shares_in_both_sets_of_windows(source, tmp_path):
    texts = [file_of(tmp_path / f"{letter}.txt", letter, 9000) for letter in "abc"]
    calibration = read_calibration(source, texts, 3 * 8 * 128)
    assert calibration.name == "a.txt+b.txt+c.txt"
    assert calibration.windows.shape == (24, 128)
    for windows, share in zip(text.split_windows(calibration.windows), (6, 2), strict=True):
        letters, counts = np.unique(windows, return_counts=True)
        assert letters.tolist() == [tiny_models.encode(letter)[0] for letter in "abc"]
        assert counts.tolist() == [share * 128] * 3
    assert len(np.unique(calibration.windows[:12])) == 3  # the first windows have all texts


def test_a_text_that_is_named_twice_has_two_shares_in_both_sets_of_windows(source, tmp_path):
    a, b = (file_of(tmp_path / f"{letter}.txt", letter, 20000) for letter in "ab")
    calibration = read_calibration(source, [a, b, a], 24 * 128)
    assert calibration.name == "2 a.txt+b.txt"
    for windows, share in zip(text.split_windows(calibration.windows), (6, 2), strict=True):
        letters, counts = np.unique(windows, return_counts=True)
        assert letters.tolist() == [tiny_models.encode(letter)[0] for letter in "ab"]
        assert counts.tolist() == [2 * share * 128, share * 128]
    assert len(np.unique(calibration.windows[:12])) == 2  # the first windows have both texts


def test_a_short_text_beside_others_is_refused_by_name(source, tmp_path):
    texts = [file_of(tmp_path / "long.txt", "a", 9000), file_of(tmp_path / "short.txt", "b", 1600)]
    with pytest.raises(UsageError, match=r"short.txt: 256 of the 512 tokens that are its share"):
        read_calibration(source, texts, 1024)


def test_the_bundled_text_is_the_default(source):
    named, default = (read_calibration(source, texts, 2048) for texts in ([BUNDLED], []))
    np.testing.assert_array_equal(named.windows, default.windows)
    assert named.name == default.name == "bundled"
    assert default.windows.shape == (16, 128)
    mixed = read_calibration(source, [MIXED, BUNDLED], 2048)
    assert (mixed.name, mixed.windows.shape) == ("mixed+bundled", (16, 128))
    assert not np.array_equal(mixed.windows[:4], default.windows[:4])


def test_the_default_of_a_model_with_a_chat_template_has_chats(dense_directory, tmp_path):
    shutil.copytree(dense_directory, directory := tmp_path / "chat")
    byte_model.write_companions(directory, chat=True)
    plain, chat = (read_calibration(open_checkpoint(path), [], 4096) for path in (dense_directory, directory))
    assert (plain.name, chat.name) == ("bundled", "bundled+mixed")
    with pytest.raises(
        UsageError, match="--tokens 300: bundled and mixed need at least 512, 256 for each share"
    ):
        read_calibration(open_checkpoint(directory), [], 300)
    turn = Tokenizer.load(directory).encode("<|turn|>")
    assert not np.isin(plain.windows, turn).any()
    assert np.isin(chat.windows, turn).any()


@pytest.mark.slow
def test_text_of_the_model_itself_is_reproducible_and_likely(source):
    with pytest.warns(GrinqhWarning, match="name another text beside it"):
        sampled = read_calibration(source, [SELF], 1024)
    assert sampled.name == "self"
    assert sampled.windows.shape == (8, 128)
    with pytest.warns(GrinqhWarning):
        again = read_calibration(source, [SELF], 1024)
    np.testing.assert_array_equal(again.windows, sampled.windows)
    decoder = load_decoder(source, jnp.float32)

    def loss(windows):
        logits = decoder(jnp.asarray(windows))[:, :-1]
        scores = logits - jnp.max(logits, -1, keepdims=True)
        scores -= jnp.log(jnp.sum(jnp.exp(scores), -1, keepdims=True))
        return -float(jnp.mean(jnp.take_along_axis(scores, jnp.asarray(windows)[:, 1:, None], -1)))

    other = np.random.default_rng(0).permutation(sampled.windows.reshape(-1)).reshape(8, 128)
    assert loss(sampled.windows) < loss(other) - 0.15
