"""gpt-oss in transformers with graded products in float64: an oracle of a converted model's decode steps.

Attention, sinks, windows, router, clamped SwiGLU, norms and all vectors are those of transformers' model. Its
linear layers are replaced: each computes the graded product of the converted codes (``matvec_oracle``).
"""

from collections.abc import Mapping

import matvec_oracle
import numpy as np
import torch
import transformers

from grinqh_jax.model.decoder import Decoder


def make_graded(
    original: transformers.PreTrainedModel, converted: Decoder, thresholds: Mapping[str, np.ndarray]
) -> None:
    """Replaces the linear layers of a model of gpt-oss in float64.

    Args:
      original: The model that was converted, in its original basis.
      converted: The converted model.
      thresholds: Thresholds of each token, ``[tokens, P]``, by name of the linear layer. With thresholds of 0
        a product reads all bits, as a prefill does.
    """

    def graded(linear: torch.nn.Linear, name: str, outputs: np.ndarray) -> "_GradedLinear":
        return _GradedLinear(converted.linear(name).weight, thresholds[name], outputs, linear.bias)

    for i, layer in enumerate(original.model.layers):
        attention, end = layer.self_attn, 0
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(attention, projection)
            start, end = end, end + linear.out_features
            setattr(attention, projection, graded(linear, f"layers.{i}.qkv", np.arange(start, end)))
        every = np.arange(attention.o_proj.out_features)
        attention.o_proj = graded(attention.o_proj, f"layers.{i}.o", every)
        names = [f"layers.{i}.experts_gate_up", f"layers.{i}.experts_down"]
        weights = [converted.linear(name).weight for name in names]
        layer.mlp.experts = _GradedExperts(layer.mlp.experts, weights, [thresholds[name] for name in names])
    columns = np.asarray(converted.lm_head.token_to_output[...])  # A small vocabulary has one block.
    original.lm_head = graded(original.lm_head, "lm_head.blocks.0", columns)


class _GradedLinear(torch.nn.Module):
    """Some outputs of a graded linear layer, for one text."""

    def __init__(self, weight, thresholds: np.ndarray, outputs: np.ndarray, bias: torch.Tensor | None):
        super().__init__()
        self.weight, self.thresholds, self.outputs, self.bias = weight, thresholds, outputs, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = matvec_oracle.graded_matvec(x[0].numpy(), self.weight, self.thresholds)
        y = torch.from_numpy(exact.y[None, :, self.outputs])
        return y if self.bias is None else y + self.bias


class _GradedExperts(torch.nn.Module):
    """The experts of a layer. An expert's inputs are graded times its probability (``docs/families.md``)."""

    def __init__(self, original: torch.nn.Module, weights: list, thresholds: list[np.ndarray]):
        super().__init__()
        self.original, self.weights, self.thresholds = original, weights, thresholds

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, probabilities: torch.Tensor):
        result = torch.zeros_like(hidden)
        for token, choice in np.ndindex(*experts.shape):
            expert, p = int(experts[token, choice]), float(probabilities[token, choice])
            power = 2.0 ** np.floor(np.log2(p) + 0.5)
            gate, up = (self._product(0, expert, token, hidden[token] * power) / power).chunk(2)
            outputs = torch.stack([gate, up], dim=-1).flatten() + self.original.gate_up_proj_bias[expert]
            mixed = self.original._apply_gate(outputs)
            result[token] += self._product(1, expert, token, mixed * p)
            result[token] += p * self.original.down_proj_bias[expert]
        return result

    def _product(self, projection: int, expert: int, token: int, x: torch.Tensor) -> torch.Tensor:
        weight, thresholds = self.weights[projection].expert(expert), self.thresholds[projection][token]
        return torch.from_numpy(matvec_oracle.graded_matvec(x[None].numpy(), weight, thresholds).y[0])
