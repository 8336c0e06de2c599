"""Pre-tokenizers of GGUF files: words as written by hand, and tokens as known tokenizers have them."""

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from checkpoints_tools.data import __path__ as DATA
from checkpoints_tools.source.gguf_file.contents import GGUFFile
from checkpoints_tools.source.gguf_file.tokenizer import write_tokenizer
from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.text.tokenizer import Tokenizer

TEXT = "He'LL pay 12345 euros,\n\n  x  y"
WORDS = {
    "gpt-2": ["He", "'", "LL", " pay", " 12345", " euros", ",", "\n\n ", " x", " ", " y"],
    "smollm": [
        "He",
        "'",
        "LL",
        " pay",
        " ",
        "1",
        "2",
        "3",
        "4",
        "5",
        " euros",
        ",",
        "\n\n ",
        " x",
        " ",
        " y",
    ],
    "qwen2": ["He", "'LL", " pay", " ", "1", "2", "3", "4", "5", " euros", ",\n\n", " ", " x", " ", " y"],
    "llama-bpe": ["He", "'LL", " pay", " ", "123", "45", " euros", ",\n\n", " ", " x", " ", " y"],
}


def metadata(vocabulary: dict[str, int], merges: list[str], pre: str, added: tuple[str, ...] = (), **values):
    types = gguf.TokenType
    tokens = [*vocabulary, *added]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.CONTROL if token in added else types.NORMAL for token in tokens],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }


def load(values, directory: Path) -> Tokenizer:
    write_tokenizer(GGUFFile(directory / "x.gguf", values, {}), directory)
    return Tokenizer.load(directory)


def alphabet() -> dict[str, int]:
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre, tmp_path):
    load(metadata(alphabet(), [], pre), tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = backend.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in words] == WORDS[pre]


def test_tokens_of_qwen_are_those_of_the_bundled_tokenizer(tmp_path):
    state = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    assert list(vocabulary.values()) == list(range(len(vocabulary)))
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    values = metadata(vocabulary, merges, "qwen2")
    for token in state["added_tokens"]:
        values["tokenizer.ggml.token_type"][token["id"]] = gguf.TokenType.CONTROL
    loaded, original = load(values, tmp_path), Tokenizer.load(BUNDLED_MODEL)
    text = (
        (Path(DATA[0]) / "mixed/languages.jsonl").read_text(encoding="utf-8") + TEXT + "e\u0301<|endoftext|>"
    )
    assert loaded.encode(text) == original.encode(text)
    assert loaded.decode(loaded.encode(text)) == original.decode(original.encode(text))


def test_a_text_of_llama_3_begins_with_bos_and_whole_words_win_over_merges(tmp_path):
    vocabulary = alphabet()
    vocabulary |= {"ab": 256, "abc": 257, "bc": 258}
    loaded = load(
        metadata(vocabulary, ["b c", "a b"], "llama-bpe", ("<|begin|>",), bos_token_id=259), tmp_path
    )
    assert loaded.encode("abc") == [259, 257]
    assert loaded.encode("abc", special_tokens=False) == [257]
    plain = load(metadata(vocabulary, ["b c", "a b"], "gpt-2"), tmp_path)
    assert plain.encode("abc") == [vocabulary["a"], 258]


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_tokens_around_a_text_are_those_that_the_file_asks_for(bos, eos, tmp_path):
    values = metadata(alphabet(), [], "smollm", ("<s>", "</s>"), bos_token_id=256, eos_token_id=257)
    values |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    loaded = load(values, tmp_path)
    inner = loaded.encode("a", special_tokens=False)
    assert loaded.encode("a") == [256] * bos + inner + [257] * eos
    assert loaded.decode(loaded.encode("a")) == "a"


def test_ends_of_an_answer(tmp_path):
    values = metadata(alphabet(), [], "llama-bpe", ("<|eot_id|>", "<|end_of_text|>"), eos_token_id=257)
    load(values, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [257, 256]}


def test_padding_of_the_vocabulary_is_no_token(tmp_path):
    values = metadata(alphabet(), [], "qwen2")
    values["tokenizer.ggml.tokens"].append("[PAD256]")
    values["tokenizer.ggml.token_type"].append(gguf.TokenType.UNUSED)
    loaded = load(values, tmp_path)
    assert 256 not in loaded.encode("[PAD256]")
    assert isinstance(tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).model, models.BPE)
