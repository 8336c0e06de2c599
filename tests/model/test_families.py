"""Every family against transformers, with every option on, and with each option off."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, TOKENS
from forward_passes import forward
from options_off import with_one_option_off
from random_models import state_tree

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.errors import UnsupportedModelError
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.model.families import FAMILIES

RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "family_logits.npz")
TOLERANCE = 1e-4
"""Maximum difference of float32 logits, relative to the largest logit."""

PROMPT = 12
"""Number of tokens that a prefill reads before decoding; the windows are shorter."""


def model_of(hf_config: dict, seed: int = 0) -> Decoder:
    config, tree = state_tree(hf_config, seed)
    return Decoder.from_tree(config, jax.tree.map(jnp.asarray, tree), jnp.float32)


def cases(*fast: str) -> list:
    """Returns all cases; those that are not named are slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def relative_difference(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


REFUSED = {
    "llama-yarn": [
        ({"sliding_window": 8}, "sliding_window 8"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn rope lacks factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor is 0, expected a positive number",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
    ],
    "qwen2-window": [
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"max_window_layers": None}, "max_window_layers is None"),
        ({"num_experts": 4}, "mixture of experts (num_experts 4)"),
    ],
    "qwen3-moe": [
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types of another kind"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list of layers"),
        ({"num_local_experts": 4}, "num_experts 8, num_local_experts 4: expected one number"),
        ({"num_experts": None}, "num_experts None, num_local_experts None: expected one number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8 experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
    ],
    "qwen2-moe": [
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "without a sliding_window"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is None"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types linear_attention (supported"),
    ],
    "mixtral": [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 exceeds the 5 experts"),
        ({"attention_bias": True}, "attention_bias True"),
    ],
    "olmoe": [
        ({"clip_qkv": -8.0}, "clip_qkv is -8.0, expected a positive number"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types sliding_attention without"),
    ],
    "gpt_oss": [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' (supported in this family: silu)"),
        ({"swiglu_limit": None}, "swiglu_limit is None, expected a positive number"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"sliding_window": None}, "layer_types sliding_attention without a sliding_window"),
        ({"num_experts": 5}, "num_experts 5, num_local_experts 6: expected one number of experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds the 6 experts"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized by gptq"),
    ],
    "mistral": [
        ({"layer_types": ["full_attention"] * 3}, "layer_types of another kind"),
        ({"attention_bias": True}, "attention_bias True"),
    ],
    "ministral": [({"sliding_window": None}, "layer_types sliding_attention without a sliding_window")],
    "ministral3": [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "llama_4_scaling_beta of rope_parameters is None",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "original_max_position_embeddings is None",
        ),
    ],
    "smollm3": [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], expected a list of 0 and 1 for 3 layers")
    ],
    "granite": [({"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention")],
    "phi3-longrope": [
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        (
            {"rope_parameters": {"rope_type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "expected a list of 4 positive numbers",
        ),
        ({"rope_parameters": {"rope_type": "su", "short_factor": [1.0] * 4}}, "su rope lacks long_factor"),
        ({"partial_rotary_factor": 0.35}, "partial_rotary_factor 0.35 rotates 5 of 16"),
    ],
    "olmo2": [({"sliding_window": 8}, "sliding_window 8"), ({"mlp_bias": True}, "mlp_bias True")],
    "olmo3-window-yarn": [
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters without full_attention"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types linear_attention"),
    ],
    "qwen3_5": [
        (
            {"hidden_act": "gelu_pytorch_tanh"},
            "hidden_act 'gelu_pytorch_tanh' (supported in this family: silu)",
        ),
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads 5 is not a multiple of linear_num_key_heads 2",
        ),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types without full_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types sliding_attention (supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"mlp_bias": True}, "mlp_bias True"),
    ],
    "qwen3_5-moe": [({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8 experts")],
    "qwen3-next": [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8 experts"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads 5 is not a multiple of"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list of layers"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types sliding_attention (supported"),
        ({"mlp_bias": True}, "mlp_bias True"),
    ],
    "gemma3": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
        ({"hidden_activation": "mish"}, "hidden_activation 'mish'"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized by awq"),
    ],
}
"""For each family, options that it does not have and the words that name them."""


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_a_family_lacks_are_refused_by_name(name):
    for options, message in REFUSED[name]:
        with pytest.raises(UnsupportedModelError) as caught:
            ModelConfig.from_hf(CASES[name] | options)
        assert message in str(caught.value)


def test_the_cases_cover_all_families():
    assert {config["model_type"] for config in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", cases("gemma3"))
def test_logits_equal_recorded_logits_and_every_option_matters(name):
    config, tree = state_tree(CASES[name])
    tree = jax.tree.map(jnp.asarray, tree)
    logits = Decoder.from_tree(config, tree, jnp.float32)(TOKENS[:1])[0, ::3]
    recorded = RECORDED[f"{name} logits"]
    assert relative_difference(logits, recorded) <= TOLERANCE
    options = []
    for option, changed, changed_tree in with_one_option_off(config, tree):
        logits = Decoder.from_tree(changed, changed_tree, jnp.float32)(TOKENS[:1])[0, ::3]
        assert relative_difference(logits, recorded) > 100 * TOLERANCE, option
        options.append(option)
    assert options


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    theirs = logits(torch_model(CASES[name], seed=3), TOKENS)
    assert relative_difference(model_of(CASES[name], seed=3)(TOKENS), theirs) <= TOLERANCE


@jax.jit
def prefill_and_decode(model, tokens):
    """Returns logits from position ``PROMPT - 1`` on: of a prefill in two calls, then of decode steps."""
    cache, lengths = (
        KVCache.create(model.config, len(tokens), tokens.shape[1], jnp.float32),
        jnp.array([7, 7]),
    )
    _, cache = engine.prefill(model, tokens[:, :10], lengths, cache)  # 3 tokens of padding
    prompt, cache = engine.prefill(model, tokens[:, 7:PROMPT], jnp.array([PROMPT - 7] * 2), cache)

    def step(cache, token):
        logits, cache, _ = engine.decode_step(model, token, cache, None)
        return cache, logits

    _, logits = jax.lax.scan(step, cache, tokens[:, PROMPT:].T)
    return jnp.concatenate([prompt[None], logits]).swapaxes(0, 1)


@pytest.mark.parametrize("name", cases("qwen3_5"))
def test_prefill_and_decoding_with_a_cache_equal_one_pass(name):
    model = model_of(CASES[name])
    whole = np.asarray(forward(model, TOKENS))[:, PROMPT - 1 :]
    assert relative_difference(prefill_and_decode(model, TOKENS), whole) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(name):
    model, recorded = model_of(CASES[name]), RECORDED[f"{name} greedy"][0]
    cache = KVCache.create(model.config, 1, TOKENS.shape[1], jnp.float32)
    logits, cache = engine.prefill(model, TOKENS[:1, :PROMPT], jnp.array([PROMPT]), cache)
    first = jnp.argmax(logits, axis=-1)
    chunk, _ = engine.decode_chunk(
        model,
        first,
        jnp.array([False]),
        cache,
        None,
        Sampling.create(1),
        jnp.array([-1]),
        jnp.array([len(recorded) - 1]),
        steps=len(recorded) - 1,
    )
    assert [int(first[0]), *np.asarray(chunk.tokens[0]).tolist()] == recorded.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_of_2048_tokens_equal_transformers(name):
    pytest.importorskip("torch")
    from record_logits import logits, torch_model

    hf_config = CASES[name] | {"max_position_embeddings": 4096}
    tokens = np.random.default_rng(5).integers(0, hf_config["vocab_size"], (1, 2048))
    theirs = logits(torch_model(hf_config, seed=3), tokens)
    model = model_of(hf_config, seed=3)
    ours = jax.jit(lambda model: model(tokens))(model)
    # transformers computes yarn's frequencies in float32; an angle of 2,000 radians is then off by 1e-4.
    differs = np.abs(np.asarray(ours) - theirs).max(axis=(0, 2)) > 3 * TOLERANCE * np.max(np.abs(theirs))
    # Where two experts of a mixture have the same score to within rounding, either may be chosen.
    assert np.count_nonzero(differs) <= (2 if model.config.num_experts else 0)
