"""Bytes of tokens that are parts of characters."""

import json

import pytest
from byte_model import write_companions
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from grinqh_jax.text.tokenizer import Tokenizer

TEXT = "Köln 日本 😀\n"


def byte_level(directory):
    write_companions(directory, chat=False)


def byte_fallback(directory):
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token=None))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )


@pytest.mark.parametrize("write", [byte_level, byte_fallback])
def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path, write):
    write(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == TEXT.encode()
