"""A random graded model that reads characters, as a checkpoint on disk and as a generator."""

import json
from pathlib import Path

import pytest
import tokenizers

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789#:.\n"


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    from tiny_checkpoint import HF_CONFIG, QUANTIZATION, random_tree

    from grinqh_jax.checkpoint import Writer

    directory = tmp_path_factory.mktemp("tiny")
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)} | {"<unk>": len(CHARACTERS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    # Without this file, transformers replaces the tokenizer's pre-tokenizer by that of Qwen models.
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": len(CHARACTERS)}))
    tree = random_tree()
    with Writer(directory / "model", fingerprint="tiny") as writer:
        for part in tree:
            writer.save_part(part, {part: tree[part]})
        return writer.finalize(
            HF_CONFIG,
            QUANTIZATION,
            sorted(directory.glob("*.json")),
        )


@pytest.fixture(scope="session")
def tiny(tiny_directory):
    from grinqh_jax.decoding.generator import Generator

    return Generator.load(tiny_directory)
