"""Records the logits of transformers for the models of ``random_models`` and ``family_cases`` and for
``qwen3-32m``, and its rotary frequencies for ``rope_cases``.

    PYTHONPATH=. python tests/helpers/record_logits.py [DIRECTORY_OF_QWEN3_32M]

Needs torch and transformers; the tests need only the files that this writes.
"""

import collections
import copy
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from family_cases import CASES as FAMILY_CASES
from family_cases import TOKENS as FAMILY_TOKENS
from random_models import CONFIGS, TOKENS, random_state
from rope_cases import CASES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

FIXTURES = Path(__file__).parents[1] / "fixtures"

VOCABULARY_STEP = 16
"""Distance between the recorded logits of qwen3-32m in the vocabulary."""

SHARED_TOKENS = np.random.default_rng(11).integers(2, 16384, (1, 24))


MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Names of Mixtral's projections, and those of other families."""


def torch_model(
    hf_config: dict, seed: int = 0, state: dict[str, np.ndarray] | None = None
) -> transformers.PreTrainedModel:
    """Returns a model in transformers, in float32, with the weights ``state`` or random ones."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(hf_config))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = with_fused_experts(random_state(hf_config, seed) if state is None else state)
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return model


def with_fused_experts(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns weights with the names that transformers 5 gives experts in memory: one tensor for all."""
    fused, experts = {}, collections.defaultdict(dict)
    for name, value in state.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts[match[1]][int(match[2]), MIXTRAL.get(match[3], match[3])] = value
        else:
            fused[name] = value
    for prefix, values in experts.items():
        indices = sorted({index for index, _ in values})
        gate_up = [np.concatenate([values[i, "gate_proj"], values[i, "up_proj"]]) for i in indices]
        fused[f"{prefix}.gate_up_proj"] = np.stack(gate_up)
        fused[f"{prefix}.down_proj"] = np.stack([values[i, "down_proj"] for i in indices])
    return fused


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits ``[batch, positions, vocabulary]``."""
    return model(torch.from_numpy(tokens)).logits.float().numpy()


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, tokens: np.ndarray, steps: int) -> np.ndarray:
    """The likeliest tokens one after another, int32 ``[batch, steps]``, computed without a cache."""
    for _ in range(steps):
        following = logits(model, tokens)[:, -1].argmax(axis=-1)
        tokens = np.concatenate([tokens, following[:, None]], axis=1)
    return tokens[:, -steps:].astype(np.int32)


def frequencies(hf_config: dict) -> tuple[str, np.ndarray, float] | None:
    """Returns rope type, radians per position and attention factor in transformers, or None if it fails."""
    classes = {"llama": LlamaRotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}
    try:
        config = transformers.AutoConfig.for_model(**copy.deepcopy(hf_config))
        embedding = classes[hf_config["model_type"]](config)
    except (KeyError, TypeError, ValueError):
        return None
    return config.rope_parameters["rope_type"], embedding.inv_freq.numpy(), embedding.attention_scaling


def record_families() -> None:
    """Records logits and greedy continuations of the families."""
    recorded = {}
    for name, config in FAMILY_CASES.items():
        model = torch_model(config)
        recorded[f"{name} logits"] = logits(model, FAMILY_TOKENS)[0, ::3]
        recorded[f"{name} greedy"] = greedy(model, FAMILY_TOKENS[:1, :12], 28)
    np.savez_compressed(FIXTURES / "family_logits.npz", **recorded)


def main() -> None:
    ropes = {name: frequencies(config) for name, config in CASES.items()}
    np.savez_compressed(
        FIXTURES / "rope_frequencies.npz",
        names=[name for name, rope in ropes.items() if rope is not None],
        types=[rope[0] for rope in ropes.values() if rope is not None],
        frequencies=np.stack([rope[1] for rope in ropes.values() if rope is not None]),
        attention_factors=[rope[2] for rope in ropes.values() if rope is not None],
    )
    recorded = {name: logits(torch_model(config), TOKENS)[0, ::8] for name, config in CONFIGS.items()}
    np.savez_compressed(FIXTURES / "random_logits.npz", **recorded)
    record_families()
    if len(sys.argv) > 1:
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
        kept = logits(model, SHARED_TOKENS)[0, :, ::VOCABULARY_STEP]
        np.savez_compressed(
            FIXTURES / "qwen3_32m_logits.npz", tokens=SHARED_TOKENS.astype(np.int32), logits=kept
        )


if __name__ == "__main__":
    main()
