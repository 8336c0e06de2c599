"""Fixtures: a tiny model of bytes, as an unquantized and as a GRINQH checkpoint.

Functions import the packages, because the process that starts the workers imports this module, too.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from grinqh_jax.decoding.generator import Generator

SPECIAL = ("<|end|>", "<|turn|>")
TEMPLATE = (
    "{# tools: <tool_call> #}"  # It says the form of calls and is not part of prompts.
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def hf_config(layers: int | None = None) -> dict:
    """Returns the configuration of the model, or of its first layers."""
    from random_models import CONFIGS

    config = CONFIGS["qwen3-tied-gqa"] | {"vocab_size": 256 + len(SPECIAL), "eos_token_id": 0}
    if layers is not None:
        config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    return config


def write_companions(directory: Path, *, chat: bool) -> list[Path]:
    """Writes the tokenizer (one token per byte) and the generation config; returns their paths."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}
    config |= {"chat_template": TEMPLATE} if chat else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    return sorted(directory.glob("*.json"))


@pytest.fixture(scope="session")
def dense_directory(tmp_path_factory) -> Path:
    """The directory of an unquantized Hugging Face checkpoint."""
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def one_layer_dense_directory(tmp_path_factory) -> Path:
    """The same with one layer, the unquantized model of ``one_layer_generator``."""
    return write_dense(tmp_path_factory.mktemp("dense"), layers=1)


def write_dense(directory: Path, layers: int | None = None) -> Path:
    """Writes the model, or its first layers, as an unquantized checkpoint."""
    from random_models import random_state

    write_companions(directory, chat=False)
    (directory / "config.json").write_text(json.dumps(hf_config(layers)))
    save_file(random_state(hf_config(layers)), directory / "model.safetensors")
    return directory


def write_graded(directory: Path, companions: list[Path], layers: int | None = None) -> Path:
    """Writes the model of ``dense_directory``, or its first layers, as a GRINQH checkpoint."""
    import jax.numpy as jnp
    from random_models import TARGETS, graded_model_tree, state_tree

    from grinqh_jax.checkpoint import QuantizationConfig, Writer

    config = hf_config(layers)
    _, tree = state_tree(config)
    tree = graded_model_tree(tree)

    def rounded(node):  # A checkpoint stores embedding and norms in bfloat16.
        if not isinstance(node, dict):
            return node
        small = {"embedding", "scale"}
        return {k: jnp.asarray(v, jnp.bfloat16) if k in small else rounded(v) for k, v in node.items()}

    with Writer(directory, fingerprint="tiny") as writer:
        writer.save_part("all", rounded(tree))
        writer.finalize(config, QuantizationConfig(max_bits=8, targets=TARGETS), companions)
    return directory


@pytest.fixture(scope="session")
def graded_directory(tmp_path_factory) -> Path:
    """The directory of a GRINQH checkpoint without a chat template."""
    parent = tmp_path_factory.mktemp("graded")
    return write_graded(parent / "tiny", write_companions(parent, chat=False))


@pytest.fixture(scope="session")
def one_layer_directory(tmp_path_factory) -> Path:
    """The directory of a GRINQH checkpoint of one layer, without a chat template."""
    parent = tmp_path_factory.mktemp("graded")
    return write_graded(parent / "tiny", write_companions(parent, chat=False), layers=1)


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory) -> Path:
    """The directory of a GRINQH checkpoint with a chat template, of one layer, which compiles fast."""
    parent = tmp_path_factory.mktemp("chat")
    return write_graded(parent / "tiny", write_companions(parent, chat=True), layers=1)


@pytest.fixture(scope="session")
def generator(graded_directory) -> "Generator":
    """The loaded GRINQH checkpoint. At temperature 1 it writes random bytes."""
    from grinqh_jax.decoding.generator import Generator

    return Generator.load(graded_directory)


@pytest.fixture(scope="session")
def one_layer_generator(chat_directory) -> "Generator":
    """A model of one layer, whose programs compile faster, for tests of what happens around the layers."""
    from grinqh_jax.decoding.generator import Generator

    return Generator.load(chat_directory)


@pytest.fixture
def compilations():
    """A list that gets one entry for every program that XLA compiles."""
    import jax

    events: list[str] = []

    def listen(event: str, _seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
