"""A checkpoint of a random one-layer model, in milliseconds."""

import json
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from grinqh_jax.checkpoint import QuantizationConfig, Writer
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import abstract_tree, checkpoint_leaves

HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
QUANTIZATION = QuantizationConfig(max_bits=4, targets=(1.0, 2.0, 3.0, 4.0), provenance={"quantizer": "rtn"})


def random_tree(hf_config: dict = HF_CONFIG, quantization: QuantizationConfig = QUANTIZATION) -> dict:
    """Returns a state tree of valid values: any digits, positive scales, ascending thresholds."""
    config = ModelConfig.from_hf(hf_config)
    wished = abstract_tree(config, quantization.max_bits, len(quantization.targets))
    tree = {}
    for name, leaf in traverse_util.flatten_dict(wished, sep=".").items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if leaf.dtype == jnp.uint32:
            tree[name] = rng.integers(0, 2**32, leaf.shape, np.uint32)
        elif leaf.dtype == jnp.int32:
            tree[name] = rng.permutation(leaf.shape[0]).astype(np.int32)
        else:
            values = rng.uniform(0.01, 0.2, leaf.shape)
            values = np.sort(values) if name.endswith(".thresholds") else np.asarray(values)
            tree[name] = values.astype(leaf.dtype)
    return traverse_util.unflatten_dict(tree, sep=".")


def leaves_of(model) -> dict[str, np.ndarray]:
    """Returns the arrays of a model by their dotted names in a checkpoint."""
    return {name: np.asarray(array) for name, array in checkpoint_leaves(model).items()}


def assert_same(model, tree: dict) -> None:
    """Checks that the model holds the tree's leaves: same names, same dtypes, same values."""
    expected = traverse_util.flatten_dict(tree, sep=".")
    found = leaves_of(model)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def unpack_version_1(directory: Path) -> Path:
    """Unpacks a checkpoint of format version 1 that grinqh-jax wrote before version 2; returns its path.

    A model of one layer as ``HF_CONFIG``, but with 600 tokens and an intermediate size of 280, so that layers
    of one tile and of two have fewer outputs than these tiles. 4 bits, random codes.
    """
    with zipfile.ZipFile(Path(__file__).parents[1] / "fixtures" / "checkpoint_version_1.zip") as archive:
        archive.extractall(directory / "version_1")
    return directory / "version_1"


def write(path, tree: dict | None = None, **options):
    """Writes the tiny checkpoint, one part for each top-level key, with two files beside it."""
    tokenizer, generation = path.parent / "tokenizer.json", path.parent / "generation_config.json"
    tokenizer.write_text(json.dumps({"model": "none"}))
    generation.write_text(json.dumps({"eos_token_id": [1, 2]}))
    tree = tree or random_tree()
    with Writer(path, fingerprint="tiny", **options) as writer:
        for part in tree:
            if part not in writer.parts:
                writer.save_part(part, {part: tree[part]})
        return writer.finalize(HF_CONFIG, QUANTIZATION, [tokenizer, generation])
