"""A GGUF file as a source checkpoint."""

import dataclasses
import json
import re
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.source.gguf_file.config import HEAD, ROPE_DIVISORS, hf_config
from checkpoints_tools.source.gguf_file.contents import GGUFFile, Tensor, read_header
from checkpoints_tools.source.gguf_file.tokenizer import write_tokenizer
from grinqh_jax.errors import CheckpointError, GrinqhWarning
from grinqh_jax.hf import HFCheckpoint
from grinqh_jax.hf.matching import mismatches
from grinqh_jax.hf.reader import Rows
from grinqh_jax.model.config import ModelConfig

LEAST_BITS = 8
"""Number of bits per weight below which a source draws a warning, because it is worse than the top of the
dial."""

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
"""Names in transformers of the tensors outside the layers, by their name in GGUF."""

_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""The same for the tensors of a layer, without their prefixes and ``.weight``."""

_OF_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""The same for the tensors that hold all experts of a layer, without the number of the expert."""

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_PERMUTED = re.compile(r".*self_attn\.([qk])_proj\.weight")
"""Tensors whose outputs llama.cpp permutes in the llama architecture (see ``unpermute``)."""


class TemporaryDirectory:
    """A directory that is removed with its owner, or at exit.

    ``tempfile.TemporaryDirectory`` warns if it is not closed, and a checkpoint has no method to close it.
    """

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="grinqh-gguf-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class GGUFCheckpoint(HFCheckpoint):
    """A GGUF file with the interface of a Hugging Face checkpoint.

    ``directory`` is a temporary directory with ``config.json`` and the companions. It lives as long as this
    object. ``files`` and ``stored_names`` refer to the GGUF file.

    Attributes:
      experts: Expert of each tensor that is stored with those of other experts, by canonical name.
      gguf: Header of the file.
      temporary: Owner of the temporary directory.
    """

    experts: Mapping[str, int]
    gguf: GGUFFile
    temporary: TemporaryDirectory

    def read_tensor(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        """Reads a tensor by its canonical name. Raises CheckpointError as ``read`` does.

        Tensors of types F32, F16 and BF16 keep their dtype, others are float32.
        """
        stored = self.stored_names[name]
        if name in self.experts:
            outputs = self.gguf.tensors[stored].shape[1]
            first = self.experts[name] * outputs
            return self.gguf.read(stored, slice(first, first + outputs))[rows]
        permuted = _PERMUTED.fullmatch(name) if self.config.family == "llama" else None
        if permuted is None:
            return self.gguf.read(stored, rows)
        heads = self.config.num_heads if permuted[1] == "q" else self.config.num_kv_heads
        return unpermute(self.gguf.read(stored), heads)[rows]


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Restores the order of the outputs of a query or key projection of the llama architecture.

    llama.cpp rotates channels ``2 i`` and ``2 i + 1`` together, transformers ``i`` and ``i + head_dim / 2``.

    Args:
      w: Weights ``[heads * head_dim, inputs]``.
      heads: Number of heads.
    """
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Opens a GGUF file, checks everything but the values of the weights, and writes its tokenizer.

    Warns with ``GrinqhWarning`` if the weights have fewer than 8 bits.

    Raises:
      UsageError: The package ``gguf`` is not installed.
      CheckpointError: The file is damaged, or tensors are missing, unknown, or have an unexpected shape.
      UnsupportedModelError: Architecture, tokenizer or types of the tensors are not supported.
    """
    file = read_header(path)
    config = hf_config(file)
    model = ModelConfig.from_hf(config)
    stored_names: dict[str, str] = {}
    experts: dict[str, int] = {}
    for stored, tensor in file.tensors.items():
        if names := _expert_names(stored, tensor):
            experts |= {name: expert for expert, name in enumerate(names)}
        elif stored != ROPE_DIVISORS:
            names = [_hf_name(stored)]
        stored_names |= dict.fromkeys(names, stored)
    shapes = {
        name: file.tensors[stored].shape[1 if name in experts else 0 :]
        for name, stored in stored_names.items()
    }
    if problems := mismatches(model, shapes):
        raise CheckpointError(f"{path}: " + "; ".join(problems))
    if (end := max(_end(tensor) for tensor in file.tensors.values())) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is truncated: {path.stat().st_size} bytes, expected {end}; download it again"
        )
    temporary = TemporaryDirectory()
    directory = temporary.path / path.stem  # messages and progress name the directory
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(file, directory)
    if weights := few_bits(file):
        warnings.warn(
            f"{path}: the weights have fewer than {LEAST_BITS} bits already ({weights}), so the checkpoint is"
            " at best as good as this file; a file of type BF16, F16 or Q8_0 keeps more of the original",
            GrinqhWarning,
            stacklevel=2,
        )
    return GGUFCheckpoint(
        directory=directory,
        hf_config=config,
        config=model,
        files=dict.fromkeys(stored_names, path),
        stored_names=stored_names,
        experts=experts,
        gguf=file,
        temporary=temporary,
    )


def few_bits(file: GGUFFile) -> str:
    """Describes the matrices with fewer than 8 bits, such as ``Q4_1, 5 bits, 210 of 211 matrices``.

    Empty if there are none.
    """
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    counts = Counter((tensor.type, tensor.bits) for tensor in matrices if tensor.bits < LEAST_BITS)
    return "; ".join(
        f"{kind}, {bits:.3g} bits, {count} of {len(matrices)} matrices"
        for (kind, bits), count in counts.most_common()
    )


def _hf_name(name: str) -> str:
    """Returns the name of a tensor in transformers; an unknown name as it is."""
    if (match := _LAYER_TENSOR.fullmatch(name)) and match[2] in _IN_LAYER:
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"
    return _GLOBAL.get(name, name)


def _expert_names(stored: str, tensor: Tensor) -> list[str]:
    """Returns the names in transformers of the experts' tensors in a stored one; none in other tensors."""
    match = _LAYER_TENSOR.fullmatch(stored)
    if match is None or match[2] not in _OF_EXPERTS or len(tensor.shape) != 3:
        return []
    prefix = f"model.layers.{match[1]}.mlp.experts"
    return [f"{prefix}.{expert}.{_OF_EXPERTS[match[2]]}.weight" for expert in range(tensor.shape[0])]


def _end(tensor: Tensor) -> int:
    return tensor.offset + tensor.rows * tensor.row_bytes


def metadata_of(source: HFCheckpoint) -> dict[str, Any]:
    """Returns the metadata of a GGUF source, and an empty dictionary for any other."""
    return dict(source.gguf.metadata) if isinstance(source, GGUFCheckpoint) else {}
