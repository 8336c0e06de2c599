"""Names, shapes and dtypes of a model's parameters, from its description."""

import jax.numpy as jnp

from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.layer_spec import HEAD, SINKS, GatedExperts, Norm, Projection

EMBEDDING = "embed.embedding"


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of the axes of parameters, by name."""
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_heads * config.head_dim,
        "gated_query": 2 * config.num_heads * config.head_dim,
        "key_value": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "experts": config.num_experts,
        "expert": config.expert_size,
        "routed_experts": config.num_experts - (config.mixture.shared if config.mixture else 0),
        "shared_gate": 1,
    }
    if (heads := config.delta_heads) is not None:
        sizes |= {
            "delta_qkv": heads.channels,
            "delta_value": heads.value_heads * heads.value_dim,
            "delta_heads": heads.value_heads,
            "delta_head": heads.value_dim,
        }
    return sizes


def norms(config: ModelConfig) -> dict[str, Norm]:
    """Returns all norms by dotted name, such as ``layers.0.input_norm``."""
    in_layers = {
        f"layers.{i}.{norm.name}": norm for i, spec in enumerate(config.layers) for norm in spec.norms
    }
    return in_layers | {config.final_norm.name: config.final_norm}


def projections(config: ModelConfig) -> dict[str, Projection]:
    """Returns all projections of the layers by dotted name, such as ``layers.0.qkv``, in running order."""
    return {
        f"layers.{i}.{projection.name}": projection
        for i, spec in enumerate(config.layers)
        for projection in spec.projections
    }


def router_projections(config: ModelConfig) -> dict[str, Projection]:
    """Returns all routers by dotted name. The score of a shared expert is that of its gate."""
    routed = ("routed_experts", "shared_gate") if config.mixture and config.mixture.shared else ("experts",)
    bias = config.mixture is not None and config.mixture.router_bias
    return {name: Projection(name, "hidden", routed, bias) for name in routers(config)}


def routers(config: ModelConfig) -> dict[str, str]:
    """Returns the dotted name of each router, with that of the projection that reads the same inputs."""
    return {
        f"layers.{i}.{block.mixer.router}": f"layers.{i}.{block.reads.name}"
        for i, spec in enumerate(config.layers)
        for block in spec.blocks
        if isinstance(block.mixer, GatedExperts)
    }


def sinks(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the sinks of all layers that have them, by dotted name."""
    return {
        f"layers.{i}.{SINKS}": (config.num_heads,)
        for i, spec in enumerate(config.layers)
        if spec.attention is not None and spec.attention.sinks
    }


def vectors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of a checkpoint that are neither matrices nor nested codes.

    These are norm scales, biases, sinks, and ``delta_parameters``, by dotted name.
    """
    sizes = axis_sizes(config)
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.scale": (sizes[norm.axis],) for name, norm in norms(config).items()
    }
    for name, projection in (projections(config) | router_projections(config)).items():
        if projection.bias:
            experts = (sizes["experts"],) if projection.of_experts else ()
            shapes[f"{name}.bias"] = *experts, projection.shape(sizes)[1]
    return shapes | sinks(config) | delta_parameters(config)


def delta_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of gated delta nets beside norms and projections, by dotted name.

    They are float32 in a checkpoint.
    """
    if (heads := config.delta_heads) is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        "convolution": (heads.channels, 1, heads.convolution_width),
        "log_decay": (heads.value_heads,),
        "step_bias": (heads.value_heads,),
    }
    return {
        f"layers.{i}.{spec.delta_net.name}.{leaf}": shape
        for i, spec in enumerate(config.layers)
        if spec.delta_net is not None
        for leaf, shape in shapes.items()
    }


def stream_readers(config: ModelConfig) -> dict[str, str | None]:
    """Returns the dotted names of all linear layers that read the residual stream, each with its norm's.

    The output projection is called ``HEAD``. The value is None if there is no norm. Routers (``routers``)
    read the stream, too, and are left out.
    """
    readers = {
        f"layers.{i}.{reader}": None if norm is None else f"layers.{i}.{norm.name}"
        for i, spec in enumerate(config.layers)
        for reader, norm in spec.readers.items()
    }
    return readers | {HEAD: config.final_norm.name}


def stream_writers(config: ModelConfig) -> list[str]:
    """Returns the dotted names of the projections that write the residual stream."""
    return [f"layers.{i}.{writer}" for i, spec in enumerate(config.layers) for writer in spec.writers]


def parameter_shapes(config: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """Returns, for each parameter of a dense model by dotted name, the shapes of the arrays it is made of.

    For each axis in ``Projection.outputs``, in that order, a kernel has one array ``[outputs, inputs]`` and a
    bias one array ``[outputs]``. A kernel or bias of experts has such arrays for one expert after another.
    Every other parameter is one array.
    """
    sizes = axis_sizes(config)
    shapes: dict[str, list[tuple[int, ...]]] = {EMBEDDING: [(sizes["vocab"], sizes["hidden"])]}
    shapes |= {f"{name}.scale": [(sizes[norm.axis],)] for name, norm in norms(config).items()}
    kernels = projections(config) | {HEAD: Projection(HEAD, "hidden", ("vocab",))}
    kernels |= router_projections(config)
    shapes |= {name: [shape] for name, shape in (sinks(config) | delta_parameters(config)).items()}
    for name, projection in kernels.items():
        arrays: list[tuple[int, ...]] = [
            (sizes[axis], sizes[projection.inputs]) for axis in projection.outputs
        ]
        count = sizes["experts"] if projection.of_experts else 1
        shapes[f"{name}.kernel"] = arrays * count
        if projection.bias:
            vector: list[tuple[int, ...]] = [(sizes[axis],) for axis in projection.outputs]
            shapes[f"{name}.bias"] = vector * count
    return shapes


def stored_dtypes(config: ModelConfig) -> dict[str, jnp.dtype]:
    """Returns the dtypes of ``vectors`` and of the routers' kernels in a checkpoint, by dotted name."""
    narrow, wide = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    dtypes = dict.fromkeys(vectors(config), wide)
    # bfloat16 does not hold 1 plus a small number.
    dtypes |= {f"{name}.scale": wide if norm.offset else narrow for name, norm in norms(config).items()}
    return dtypes | {f"{name}.kernel": narrow for name in routers(config)}
