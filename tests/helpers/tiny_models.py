"""Tiny Hugging Face checkpoints, with weights and a tokenizer, that convert in seconds."""

from pathlib import Path

import hf_directories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "The grey cat sat on 17 mats; 3 + 4 = 7, said she. " * 60


def tokenizer() -> Tokenizer:
    """Returns a tokenizer with one token for each byte."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    result = Tokenizer(models.BPE(letters | {"<eos>": 256}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result


def tokenizer_with_merges() -> Tokenizer:
    """Returns a tokenizer with the words of GPT-2 and some merges."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    result.train_from_iterator([TEXT], trainer)
    result.add_special_tokens(["<|end|>", "<|turn|>"])
    result.add_tokens(["<think>"])
    return result


def encode(text: str) -> list[int]:
    """Returns the token ids of a text."""
    return tokenizer().encode(text).ids


def write(directory: Path, hf_config: dict = hf_directories.QWEN3, **options) -> Path:
    """Writes a checkpoint with ``hf_directories.write``, and the files of a tokenizer."""
    hf_directories.write(directory, hf_config, **options)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<eos>").save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    return directory


def text_file(path: Path) -> Path:
    """Writes a calibration text."""
    path.write_text(TEXT)
    return path
