"""A stream gives exactly the text of ``decode``, for any sequence of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_settings import examples
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from grinqh_jax.text.stream import TextStream


def byte_level() -> Tokenizer:
    """A tokenizer with every byte, and tokens that begin, end or span characters of several bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    bytes_of = dict(zip("é日🎉 ", (encode(character)[0][0] for character in "é日🎉 "), strict=True))
    pieces = [bytes_of["é"], bytes_of["日"][1:], bytes_of["🎉"][:2], bytes_of["🎉"][2:] + "a", "the"]
    pieces += [bytes_of["日"][2:] + bytes_of["🎉"][:3], bytes_of[" "] + "cat", encode("\ufffd")[0][0]]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys([*letters, *pieces]))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.add_tokens(["<note>", "日", " b"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A tokenizer like Llama 2's: characters, words with ``▁`` for blanks, a token for every other byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += [*"▁abc.é", "▁the", "▁▁▁", "th", "\ufffd", "a\ufffd", "日本"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.add_tokens(["<note>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer like T5's and Gemma's, whose decoder drops the blank before the first word."""
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abc.", "▁the", "▁▁"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


TOKENIZERS = {build.__name__: build() for build in (byte_level, byte_fallback, metaspace)}


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(100, in_ci=2000)
@given(data=st.data())
def test_the_pieces_are_the_text_of_decode(name, data):
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    # Some ids are beyond the vocabulary, because models pad their embedding. Most of the vocabulary is single
    # bytes, so half of the ids are drawn from its end, where the other tokens are.
    ids = st.one_of(st.integers(0, size + 3), st.integers(max(0, size - 20), size + 3))
    tokens = data.draw(st.lists(ids, max_size=40))
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert stream.flush() == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [("byte_level", "é日🎉 the cat"), ("byte_fallback", "▁the▁a."), ("metaspace", "▁the▁a.")],
)
def test_a_complete_character_is_not_held_back(name, text):
    tokenizer = TOKENIZERS[name]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name == "byte_level":
        tokens = [tokenizer.token_to_id(c) for c in letters.pre_tokenize_str(text)[0][0]]
    else:
        tokens = [tokenizer.token_to_id(c) for c in text]
        tokens = [t for t in tokens if t is not None]
    stream = TextStream(tokenizer)
    shown = ""
    for n, token in enumerate(tokens, 1):
        shown += stream.push(token)
        assert tokenizer.decode(tokens[:n]).rstrip("\ufffd") == shown


def test_a_run_of_byte_tokens_is_shown_when_it_ends():
    tokenizer = TOKENIZERS["byte_fallback"]
    run = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é日".encode()]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in run] == [""] * len(run)
    assert stream.push(tokenizer.token_to_id("a")) == "é日a"
    bad = TextStream(tokenizer)
    shown = [bad.push(token) for token in [*run, run[0]]] + [bad.push(tokenizer.token_to_id("a"))]
    assert "".join(shown) == "\ufffd" * (len(run) + 1) + "a"
