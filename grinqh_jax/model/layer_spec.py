"""The structure of a decoder, declared in one place: norms and projections, their order and data flow.

A decoder embeds tokens into a residual stream, passes the stream through its layers, and projects it to
logits after a final norm. A layer is a sequence of residual blocks, each of which reads the stream and adds
its result to the stream. A family (``families``) makes the description of a model from its configuration.
Decoder, loader, statistics and converter all read this description.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from grinqh_jax.model.logit_transform import IDENTITY, LogitTransform
from grinqh_jax.model.rope import RopeConfig

HEAD = "lm_head"
"""Name of the output projection, and prefix of the names of its vocabulary blocks."""

SINKS = "sinks"
"""Name in the layer of the sinks of attention."""


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """The gated activation of gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)``, clamped.

    Attributes:
      alpha: Factor of the gate in the sigmoid.
      limit: Largest gate, and largest absolute value of ``up``, before everything else.
    """

    alpha: float = 1.702
    limit: float = 7.0


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"] | ClampedSwiGLU
"""Activation of a gated MLP. Of ``gate`` alone, then multiplied by ``up``: SiLU, GELU (arXiv 1606.08415), its
tanh approximation, and ReLU."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMS norm.

    Attributes:
      name: Name in the layer.
      axis: Name of the axis that it normalizes, a key of ``parameters.axis_sizes``.
      offset: Number added to the weight that Hugging Face stores. The sum is the norm scale.
    """

    name: str
    axis: str = "hidden"
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer, stored as one matrix ``[inputs, outputs]``, or as one for each expert.

    Attributes:
      name: Name in the layer.
      inputs: Name of the axis of the input channels, a key of ``parameters.axis_sizes``.
      outputs: Names of the axes that make up the outputs, side by side.
      bias: Whether a learned vector is added to the outputs, another one for each expert.
      of_experts: Whether each expert of the layer has a matrix: ``[experts, inputs, outputs]``.
    """

    name: str
    inputs: str
    outputs: tuple[str, ...]
    bias: bool = False
    of_experts: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Returns ``(in_features, out_features)`` for the sizes of the axes."""
        return sizes[self.inputs], sum(sizes[axis] for axis in self.outputs)


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """A factor of the queries that grows with their position p: ``1 + rate * log(1 + floor(p / length))``.

    Source: "temperature tuning" of Llama 4 and Ministral 3.
    """

    rate: float
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal grouped-query attention; mixes query, key and value heads.

    Attributes:
      rope: Rotary positions of queries and keys; None for a layer without positions.
      window: Number of last positions that a token attends to, including that of the token; None for all.
      head_norms: Norms of the queries and of the keys before the rotation, or None. With the axis ``head``
        they normalize each head, with ``query`` and ``key_value`` all heads together.
      qkv_limit: Largest absolute value of queries, keys and values after these norms; None for no limit.
      score_scale: Factor of the scores; None for ``head_dim ** -0.5``.
      score_soft_cap: Limit c of the scores s, which become ``c * tanh(s / c)``; None for no limit.
      query_growth: Factor of the queries, or None.
      output_gate: Whether each head is multiplied by the sigmoid of a gate of its width. Each query head is
        followed by its gate in the outputs of ``reads`` (axis ``gated_query``).
      sinks: Whether each query head has a sink (parameter ``SINKS``), a score without a value: it takes part
        in the softmax only.
    """

    rope: RopeConfig | None
    window: int | None = None
    head_norms: tuple[Norm, Norm] | None = None
    qkv_limit: float | None = None
    score_scale: float | None = None
    score_soft_cap: float | None = None
    query_growth: QueryGrowth | None = None
    output_gate: bool = False
    sinks: bool = False


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet:
    """A gated delta net (``delta_net``), which mixes tokens with a state of fixed size.

    Attributes:
      head_norm: Norm of each value head of the results.
      name: Name of the module that holds the other parameters.
    """

    head_norm: Norm
    name: str = "delta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaHeads:
    """Sizes of the gated delta nets of a model.

    Attributes:
      key_heads: Number of key heads, and of query heads.
      value_heads: Number of value heads; ``value_heads / key_heads`` consecutive ones share a key head.
      key_dim, value_dim: Width of a key head and of a value head.
      convolution_width: Number of tokens that a causal convolution sees, its own included.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    convolution_width: int

    @property
    def channels(self) -> int:
        """Number of channels of queries, keys and values together, which a convolution filters."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """``activation(gate) * up``, where the outputs of ``reads`` are ``gate`` and then ``up``.

    ``ClampedSwiGLU`` is a function of both.
    """

    activation: Activation = "silu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedExperts:
    """A mixture of experts (arXiv 1701.06538), each of which is a gated MLP.

    A router gives every expert a score. The softmax of the scores is the experts' probabilities ``p``, and
    the experts with the largest ones are chosen. The block's result is ``sum_e p_e
    writes_e(activation(gate_e) * up_e)`` over the chosen experts (see ``GatedMLP``).

    Attributes:
      chosen: Number of experts that are chosen for each token.
      normalized: Whether the chosen probabilities are divided by their sum. They are then the softmax of the
        chosen scores alone.
      router: Name of the projection from the inputs of ``reads`` to the scores. It is not quantized.
      router_bias: Whether a learned vector is added to the scores.
      activation: Activation of the experts.
      shared: Number of last experts that are chosen for every token beside these. A shared expert is cut into
        experts of the usual width, the last of which has zeros behind its channels. Their probability is the
        sigmoid of the router's last score, the other experts' probabilities are those without it.
      shared_width: Width of the shared expert.
    """

    chosen: int
    normalized: bool
    router: str = "router"
    router_bias: bool = False
    activation: Activation = "silu"
    shared: int = 0
    shared_width: int = 0

    @property
    def rows(self) -> int:
        """Number of experts that read a token: the chosen ones and the shared ones."""
        return self.chosen + self.shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualBlock:
    """``x + multiplier * norm_after(writes(mixer(reads(norm(x)))))``, where x is the residual stream.

    In a mixture of experts ``reads`` and ``writes`` have a matrix for each expert (see ``GatedExperts``).

    Attributes:
      norm: Norm that the block reads the stream through; None for none.
      reads: Projection of the stream after the norm.
      mixer: Function from the outputs of ``reads`` to the inputs of ``writes``.
      writes: Projection to the width of the stream.
      norm_after: Norm of the outputs of ``writes``; None for none.
      multiplier: Factor of what is added to the stream.
    """

    norm: Norm | None
    reads: Projection
    mixer: Attention | GatedDeltaNet | GatedMLP | GatedExperts
    writes: Projection
    norm_after: Norm | None = None
    multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The structure of one decoder layer.

    Attributes:
      blocks: Residual blocks in the order in which they run.
    """

    blocks: tuple[ResidualBlock, ...]

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections in the order in which they run."""
        return tuple(projection for block in self.blocks for projection in (block.reads, block.writes))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the projections in the order in which they run."""
        return tuple(projection.name for projection in self.projections)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms, those of heads included."""
        norms = [norm for block in self.blocks for norm in (block.norm, block.norm_after) if norm is not None]
        for block in self.blocks:
            if isinstance(block.mixer, Attention) and block.mixer.head_norms is not None:
                norms += block.mixer.head_norms
            if isinstance(block.mixer, GatedDeltaNet):
                norms.append(block.mixer.head_norm)
        return tuple(norms)

    @property
    def attention(self) -> Attention | None:
        """Attention of the layer, if it has one."""
        return next((block.mixer for block in self.blocks if isinstance(block.mixer, Attention)), None)

    @property
    def delta_net(self) -> GatedDeltaNet | None:
        """Gated delta net of the layer, if it has one. Its state is recurrent (``cache.RecurrentState``)."""
        return next((block.mixer for block in self.blocks if isinstance(block.mixer, GatedDeltaNet)), None)

    @property
    def experts(self) -> GatedExperts | None:
        """Mixture of experts of the layer, if it has one."""
        return next((block.mixer for block in self.blocks if isinstance(block.mixer, GatedExperts)), None)

    @property
    def readers(self) -> dict[str, Norm | None]:
        """Names of the projections that read the residual stream, each with its norm."""
        return {block.reads.name: block.norm for block in self.blocks}

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the projections that write the residual stream."""
        return tuple(block.writes.name for block in self.blocks)

    def block_of(self, projection: str) -> ResidualBlock:
        """Returns the block of the projection of this name.

        Raises:
          KeyError: The layer has no such projection.
        """
        for block in self.blocks:
            if projection in (block.reads.name, block.writes.name):
                return block
        raise KeyError(f"{projection}: a layer has the projections {', '.join(self.names)}")

    def block_after(self, block: ResidualBlock) -> ResidualBlock | None:
        """Returns the block that runs after another one; None after the last."""
        following = self.blocks[self.blocks.index(block) + 1 :]
        return following[0] if following else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The structure of a whole decoder.

    Attributes:
      layers: Structure of each layer.
      final_norm: Norm that the output projection reads the residual stream through.
      embedding_multiplier: Factor of the embeddings, rounded to the dtype of the residual stream.
      logit_transform: Function from the outputs of the output projection to logits.
      num_experts: Number of experts of each mixture, shared ones included; 0 if the model has none.
      expert_size: Width of an expert: outputs of its gate projection, and of its up projection.
      delta_heads: Sizes of the gated delta nets; None if the model has none.
    """

    layers: tuple[LayerSpec, ...]
    final_norm: Norm = Norm("norm")
    embedding_multiplier: float = 1.0
    logit_transform: LogitTransform = IDENTITY
    num_experts: int = 0
    expert_size: int = 0
    delta_heads: DeltaHeads | None = None

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer has a recurrent state, which earlier tokens cannot be taken out of."""
        return any(layer.delta_net is not None for layer in self.layers)

    @property
    def mixture(self) -> GatedExperts | None:
        """Mixture of experts of the first layer that has one; all have the same experts."""
        return next((layer.experts for layer in self.layers if layer.experts is not None), None)
