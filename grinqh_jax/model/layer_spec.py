"""The structure of a decoder, declared in one place: norms and projections, their order, sizes and data flow.

A decoder embeds tokens into a residual stream, passes the stream through its layers, and projects it to
logits after a final norm. A layer is a sequence of residual blocks, each of which reads the stream through a
norm and adds its result to the stream. Decoder, loader, statistics and converter all read this description.
"""

import dataclasses
import functools
from collections.abc import Mapping

from grinqh_jax.model.config import ModelConfig

HEAD = "lm_head"
"""Name of the output projection, and prefix of the names of its vocabulary blocks."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMS norm.

    Attributes:
      name: Name in the layer.
      axis: Name of the axis that it normalizes, a key of ``axis_sizes``.
    """

    name: str
    axis: str = "hidden"


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer, stored as one matrix ``[inputs, outputs]``.

    Attributes:
      name: Name in the layer.
      inputs: Name of the axis of the input channels, a key of ``axis_sizes``.
      outputs: Names of the axes that make up the outputs, side by side.
    """

    name: str
    inputs: str
    outputs: tuple[str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Returns ``(in_features, out_features)`` for the sizes of the axes."""
        return sizes[self.inputs], sum(sizes[axis] for axis in self.outputs)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary positions; mixes query, key and value heads.

    Attributes:
      head_norms: Norms of every query head and of every key head before the rotation, or None.
    """

    head_norms: tuple[Norm, Norm] | None


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """``silu(gate) * up``, where the outputs of ``reads`` are ``gate`` and then ``up``."""


@dataclasses.dataclass(frozen=True)
class ResidualBlock:
    """``x + writes(mixer(reads(norm(x))))``, where x is the residual stream.

    Attributes:
      norm: Norm that the block reads the stream through.
      reads: Projection of the normalized stream.
      mixer: Function from the outputs of ``reads`` to the inputs of ``writes``.
      writes: Projection whose outputs are added to the stream.
    """

    norm: Norm
    reads: Projection
    mixer: Attention | SwiGLU
    writes: Projection


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
        norms = [block.norm for block in self.blocks]
        for block in self.blocks:
            if isinstance(block.mixer, Attention) and block.mixer.head_norms is not None:
                norms += block.mixer.head_norms
        return tuple(norms)

    @property
    def readers(self) -> dict[str, str]:
        """Names of the projections that read the residual stream, each with the name of its norm."""
        return {block.reads.name: block.norm.name for block in self.blocks}

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

    def norm_after(self, projection: str) -> str | None:
        """Returns the name of the norm that follows a projection's block; None after the last block.

        Raises:
          KeyError: The layer has no such projection.
        """
        following = self.blocks[self.blocks.index(self.block_of(projection)) + 1 :]
        return following[0].norm.name if following else None


FINAL_NORM = Norm("norm")
"""Norm that the output projection reads the residual stream through."""


@functools.cache
def layer_spec(config: ModelConfig) -> LayerSpec:
    """Returns the structure of every layer of a model: attention, then a SwiGLU MLP, each after a norm."""
    head_norms = (Norm("q_norm", "head"), Norm("k_norm", "head")) if config.qk_norm else None
    attention = ResidualBlock(
        norm=Norm("input_norm"),
        reads=Projection("qkv", "hidden", ("query", "key_value", "key_value")),
        mixer=Attention(head_norms),
        writes=Projection("o", "query", ("hidden",)),
    )
    mlp = ResidualBlock(
        norm=Norm("post_norm"),
        reads=Projection("gate_up", "hidden", ("intermediate", "intermediate")),
        mixer=SwiGLU(),
        writes=Projection("down", "intermediate", ("hidden",)),
    )
    return LayerSpec((attention, mlp))


def stream_readers(config: ModelConfig) -> dict[str, str]:
    """Returns the names of all projections that read the residual stream, each with the name of its norm.

    The output projection is one of them.
    """
    return layer_spec(config).readers | {HEAD: FINAL_NORM.name}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of the axes of parameters, by name."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
    }


def parameter_shapes(config: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """Returns, for each parameter of a dense model by dotted name, the shapes of the arrays it is made of.

    A kernel is made of one array ``[outputs, inputs]`` for each axis in ``Projection.outputs``, in that
    order. Every other parameter is one array.
    """
    sizes, layer = axis_sizes(config), layer_spec(config)

    def scale(norm: Norm) -> list[tuple[int, ...]]:
        return [(sizes[norm.axis],)]

    def kernel(projection: Projection) -> list[tuple[int, ...]]:
        return [(sizes[axis], sizes[projection.inputs]) for axis in projection.outputs]

    shapes: dict[str, list[tuple[int, ...]]] = {"embed.embedding": [(sizes["vocab"], sizes["hidden"])]}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{norm.name}.scale": scale(norm) for norm in layer.norms}
        shapes |= {f"layers.{i}.{p.name}.kernel": kernel(p) for p in layer.projections}
    shapes[f"{FINAL_NORM.name}.scale"] = scale(FINAL_NORM)
    shapes[f"{HEAD}.kernel"] = kernel(Projection(HEAD, "hidden", ("vocab",)))
    return shapes
