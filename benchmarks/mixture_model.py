"""A Qwen3-MoE decoder that can be trained: its parameters, made of a dense Qwen3, and its loss.

The decoder of the product has no gradient at the weights of experts. Parameters have the product's names
(``qkv.kernel``), one array for all layers each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grinqh_jax.hf import HFCheckpoint, params
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.rope import inverse_frequencies

Parameters = dict[str, Array]
"""Float32 parameters by name: ``embed.embedding``, ``norm.scale``, and those of layers, ``[layers, ...]``,
by name in the layer."""

OUTSIDE = "embed.embedding", "norm.scale"
"""Parameters outside of the layers. The output projection is the embedding."""

SCORES = 1.0
"""Standard deviation of the scores of new routers, whose inputs are normalized."""


class Upcycling(NamedTuple):
    """How a dense MLP becomes experts.

    Attributes:
      experts: Number of experts of a layer.
      chosen: Number of experts that a token reads; a divisor of ``experts`` and of the channels of the MLP.
        The MLP is cut into this many slices of channels, and each slice becomes equally many experts.
      noise: Standard deviation of the noise on each expert's weights, relative to that of the weights.
    """

    experts: int
    chosen: int
    noise: float


def hf_config(dense: dict, upcycling: Upcycling) -> dict:
    """Returns the Qwen3-MoE configuration of an upcycled Qwen3.

    Raises:
      ValueError: The model is no dense Qwen3 with tied embeddings, or the numbers do not divide each other.
    """
    experts, chosen, _ = upcycling
    if dense.get("model_type") != "qwen3" or not dense.get("tie_word_embeddings"):
        kind, tied = dense.get("model_type"), dense.get("tie_word_embeddings")
        raise ValueError(
            f"model_type is {kind!r}, tie_word_embeddings {tied!r}: give a Qwen3 model with tied embeddings"
        )
    width = dense["intermediate_size"]
    if experts % chosen or width % chosen:
        raise ValueError(f"{chosen} chosen experts must divide {experts} experts and {width} channels")
    return dense | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width // chosen,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "layer_types": None,
    }


def upcycled(dense: HFCheckpoint, upcycling: Upcycling, rng: np.random.Generator) -> Parameters:
    """Returns the parameters of the mixture.

    Without noise it computes what the dense model computes: each token reads one expert of every slice,
    because the experts of a slice have different routers, and all slices the same ones. The probabilities are
    then equal, and ``down`` is multiplied by their number. (This follows the idea of virtual groups, arXiv
    2410.07524.) Training moves the routers of the slices apart.
    """
    experts, chosen, noise = upcycling
    layers = dense.config.num_layers
    stacked: dict[str, Any] = {}
    for key in dense.parameters:
        if key.startswith("layers.0."):
            name = key.removeprefix("layers.0.")
            values = [dense.read(f"layers.{i}.{name}") for i in range(layers)]
            stacked[name] = np.stack(values).astype(np.float32)
    gate_up, down = stacked.pop("gate_up.kernel"), stacked.pop("down.kernel")
    copies, (width, hidden) = experts // chosen, down.shape[1:]
    # The experts are ordered by slice, then by copy.
    gate_up = gate_up.reshape(layers, hidden, 2, chosen, width // chosen).transpose(0, 3, 1, 2, 4)
    gate_up = gate_up.reshape(layers, chosen, hidden, -1)
    down = chosen * down.reshape(layers, chosen, width // chosen, hidden)
    for name, kernel in (("experts_gate_up", gate_up), ("experts_down", down)):
        kernel = np.repeat(kernel, copies, axis=1)
        added = noise * kernel.std() * rng.standard_normal(kernel.shape, np.float32)
        stacked[f"{name}.kernel"] = kernel + added
    router = SCORES * hidden**-0.5 * rng.standard_normal((layers, hidden, copies), np.float32)
    stacked["router.kernel"] = np.tile(router, (1, 1, chosen))
    outside = {key: np.asarray(dense.read(key), np.float32) for key in OUTSIDE}
    return {name: jnp.asarray(value) for name, value in (stacked | outside).items()}


def tensors(parameters: Parameters, config: ModelConfig, dtype) -> dict[str, np.ndarray]:
    """Returns the Hugging Face tensors of the parameters, by name."""
    named: dict[str, np.ndarray] = {}
    for name, value in parameters.items():
        if name in OUTSIDE:
            named |= params.to_tensors(config, name, np.asarray(value))
            continue
        for i, of_layer in enumerate(np.asarray(value)):
            named |= params.to_tensors(config, f"layers.{i}.{name}", of_layer)
    return {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in named.items()}


class Losses(NamedTuple):
    """Means over the tokens of a batch.

    Attributes:
      cross_entropy: Negative log-likelihood of the next tokens, in nats.
      imbalance: Load-balancing loss, mean over the layers: 1 if all experts are used equally. It is
        ``experts * sum_e f_e P_e`` with the share ``f_e`` of the rows and the mean probability ``P_e`` of an
        expert (arXiv 2101.03961).
      usage: Share of the rows that each expert gets.
    """

    cross_entropy: Float[Array, ""]
    imbalance: Float[Array, ""]
    usage: Float[Array, "layers e"]


def losses(
    parameters: Parameters,
    tokens: Int[Array, "b t"],
    config: ModelConfig,
    *,
    capacity: float | None,
    dtype=jnp.float32,
) -> Losses:
    """Runs the decoder over whole windows.

    Args:
      parameters: Parameters.
      tokens: Token ids.
      config: Configuration of the mixture.
      capacity: Rows that an expert can take, as a multiple of the mean. Further rows of a batch are dropped.
        None drops none.
      dtype: Dtype of hidden states and products.
    """
    layers = {name: value for name, value in parameters.items() if name not in OUTSIDE}
    kernels = {name: value.astype(dtype) for name, value in layers.items() if name.endswith("kernel")}
    angles = _angles(tokens.shape[1], config)

    @jax.checkpoint
    def layer(x, leaves):
        x += _attention(leaves, _rms_norm(x, leaves["input_norm.scale"], config), angles, config)
        update, imbalance, usage = _mixture(
            leaves, _rms_norm(x, leaves["post_norm.scale"], config), config, capacity
        )
        return x + update, (imbalance, usage)

    x = parameters["embed.embedding"].astype(dtype)[tokens]
    x, (imbalance, usage) = jax.lax.scan(layer, x, layers | kernels)
    x = _rms_norm(x, parameters["norm.scale"], config)[:, :-1]
    head = parameters["embed.embedding"].astype(dtype)
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    of_next = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    cross_entropy = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_next)
    return Losses(cross_entropy, jnp.mean(imbalance), usage)


def _rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    values = x.astype(jnp.float32)
    mean = jnp.mean(values**2, axis=-1, keepdims=True)
    return (values * jax.lax.rsqrt(mean + config.rms_norm_eps) * scale).astype(x.dtype)


def _angles(length: int, config: ModelConfig) -> Float[Array, "t half"]:
    attention = config.layers[0].attention
    assert attention is not None, "all layers of Qwen3 have attention"
    assert attention.rope is not None, "all layers of Qwen3 have positions"
    return jnp.arange(length)[:, None] * inverse_frequencies(attention.rope, config.head_dim)


def _rotated(heads: Float[Array, "b t h d"], angles: Float[Array, "t half"]) -> Float[Array, "b t h d"]:
    cos, sin = (f(angles)[:, None].astype(heads.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(leaves: Parameters, x: Float[Array, "b t d"], angles: Array, config: ModelConfig) -> Array:
    b, t, _ = x.shape
    queries, key_values = config.num_heads, config.num_kv_heads
    heads = (x @ leaves["qkv.kernel"]).reshape(b, t, queries + 2 * key_values, config.head_dim)
    q, k, v = jnp.split(heads, [queries, queries + key_values], axis=2)
    q = _rotated(_rms_norm(q, leaves["q_norm.scale"], config), angles)
    k = _rotated(_rms_norm(k, leaves["k_norm.scale"], config), angles)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(b, t, -1) @ leaves["o.kernel"]


def _mixture(
    leaves: Parameters, x: Float[Array, "b t d"], config: ModelConfig, capacity: float | None
) -> tuple[Array, Array, Array]:
    """Returns the sum of the chosen experts, the load-balancing loss and the usage."""
    mixture, experts = config.layers[0].experts, config.num_experts
    assert mixture is not None, "all layers are mixtures"
    rows, chosen = x.reshape(-1, x.shape[-1]), mixture.chosen
    scores = jnp.matmul(rows, leaves["router.kernel"], preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1)
    factors, choice = jax.lax.top_k(probabilities, chosen)
    factors = (factors / jnp.sum(factors, axis=-1, keepdims=True)).astype(x.dtype)
    choice = choice.reshape(-1)
    used = jax.nn.one_hot(choice, experts, dtype=jnp.int32)
    # Each expert has a buffer of the rows that it takes. A row that exceeds it has no place there.
    most = len(rows) if capacity is None else min(int(capacity * len(choice) / experts) + 1, len(rows))
    rank = jnp.take_along_axis(jnp.cumsum(used, axis=0), choice[:, None], axis=1)[:, 0] - 1
    place = jnp.where(rank < most, choice * most + rank, experts * most)
    inputs = jnp.zeros((experts * most, x.shape[-1]), x.dtype)
    inputs = inputs.at[place].set(jnp.repeat(rows, chosen, axis=0), mode="drop").reshape(experts, most, -1)
    gate, up = jnp.split(jnp.einsum("ecd,edf->ecf", inputs, leaves["experts_gate_up.kernel"]), 2, axis=-1)
    outputs = jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, leaves["experts_down.kernel"])
    outputs = outputs.reshape(experts * most, -1).at[place].get(mode="fill", fill_value=0)
    summed = jnp.sum(outputs.reshape(-1, chosen, x.shape[-1]) * factors[..., None], axis=1)
    usage = jnp.mean(used.astype(jnp.float32), axis=0)
    imbalance = experts * jnp.sum(usage * jnp.mean(probabilities, axis=0))
    return summed.reshape(x.shape), imbalance, usage
