"""Reads the rotary embedding of a configuration, in every spelling that transformers 5 resolves."""

import math
from collections.abc import Mapping

from grinqh_jax.model.config_reader import GLOBAL, SLIDING, ConfigReader
from grinqh_jax.model.rope import DEFAULT_ROPE_THETA, RopeConfig, RopeType

ROPE_TYPES: Mapping[str, RopeType] = {
    "default": "default",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
"""Spellings of the types of rotary embeddings."""

ORIGINAL = "original_max_position_embeddings"

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""Keys that a type of rotary embedding needs."""


def read_rope(
    reader: ConfigReader,
    *,
    theta: float = DEFAULT_ROPE_THETA,
    types: Mapping[str, RopeType] | None = None,
    partial: bool = False,
) -> RopeConfig:
    """Reads one rotary embedding for all layers.

    A ``rope_scaling`` that is not empty (transformers 4) replaces ``rope_parameters`` (transformers 5) as a
    whole. A ``rope_theta`` inside that object wins over one at the top level of the configuration, and
    ``rope_type`` wins over ``type``. For ``original_max_position_embeddings`` the top level wins.

    Args:
      reader: Configuration.
      theta: Base of the frequencies if there is none.
      types: Supported spellings of the type and their meaning; ``ROPE_TYPES`` by default.
      partial: Whether the family implements ``partial_rotary_factor``.
    """
    scaling = reader.section("rope_scaling")
    rope = scaling if scaling.values else reader.section("rope_parameters")
    # Other model families nest one such object for each kind of layer. In configurations of these families,
    # transformers fails on nested objects or ignores them silently.
    if layers := [key for key, value in rope.values.items() if isinstance(value, Mapping)]:
        reader.problem(f"rope parameters for each kind of layer ({', '.join(layers)})")
        return RopeConfig()
    return _rope(rope, reader, theta, ROPE_TYPES if types is None else types, partial)


def read_ropes_by_kind(
    reader: ConfigReader, theta: float, sliding_theta: float, sliding_key: str | None = None
) -> dict[str, RopeConfig]:
    """Reads one rotary embedding for global layers and one for sliding layers, by kind.

    Old configurations have one ``rope_scaling``, which is for global layers.

    Args:
      reader: Configuration.
      theta: Base for global layers if there is none.
      sliding_theta: Base for sliding layers if there is none.
      sliding_key: Key of the base for sliding layers in old configurations.
    """
    parameters = reader.section("rope_parameters")
    if parameters.values and not {GLOBAL, SLIDING} & parameters.values.keys():
        reader.problem(f"rope_parameters without {GLOBAL} and {SLIDING}")
    by_kind = {kind: dict(parameters.section(kind).values) for kind in (GLOBAL, SLIDING)}
    by_kind[GLOBAL] |= reader.section("rope_scaling").values
    beside = {
        GLOBAL: {"rope_theta": reader.values.get("rope_theta", theta)},
        SLIDING: {"rope_theta": reader.values.get(sliding_key or "", sliding_theta)},
    }
    common = ("max_position_embeddings", "partial_rotary_factor")
    beside_all = {key: reader.values.get(key) for key in common}
    types = {name: kind for name, kind in ROPE_TYPES.items() if kind != "longrope"}
    for kind, values in by_kind.items():
        if not values.get("truncate", True):
            # transformers 5.24 reads ``truncate`` from the object around those of the kinds.
            reader.problem(
                f"truncate {values['truncate']} in the rope of {kind}, where transformers ignores it"
            )
    return {
        kind: _rope(reader.nested(values), reader.nested(beside[kind] | beside_all), theta, types, False)
        for kind, values in by_kind.items()
    }


def _rope(
    rope: ConfigReader, beside: ConfigReader, theta: float, types: Mapping[str, RopeType], partial: bool
) -> RopeConfig:
    """Reads a rotary embedding from its object and the keys ``beside`` it."""
    theta = (rope if "rope_theta" in rope.values else beside).number_not_null("rope_theta", theta)
    rotary_dim = _rotary_dim(rope, beside, partial)
    name = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(name, str) or name not in types:
        rope.problem(f"rope type {name!r} (supported: {', '.join(types)})")
        return RopeConfig(theta=theta)
    kind = types[name]
    if missing := [key for key in REQUIRED.get(kind, ()) if key not in rope.values]:
        rope.problem(f"{name} rope lacks {', '.join(missing)}")
        return RopeConfig(theta=theta)
    positions = beside.integer("max_position_embeddings", 1)
    original = (beside if ORIGINAL in beside.values else rope).integer(ORIGINAL, positions)
    match kind:
        case "linear":
            return RopeConfig(
                theta=theta, type=kind, rotary_dim=rotary_dim, factor=rope.number_not_null("factor", 1.0)
            )
        case "llama3":
            return _llama3(rope, theta, rotary_dim, original)
        case "yarn":
            return _yarn(rope, theta, rotary_dim, original, positions)
        case "longrope":
            return _longrope(rope, theta, rotary_dim or _head_dim(beside), original, positions)
    return RopeConfig(theta=theta, rotary_dim=rotary_dim)


def _head_dim(beside: ConfigReader) -> int:
    heads = beside.integer("num_attention_heads", 1)
    return beside.integer("head_dim", max(beside.integer("hidden_size", 1) // heads, 1))


def _rotary_dim(rope: ConfigReader, beside: ConfigReader, partial: bool) -> int | None:
    """Returns the number of rotated channels of a head; None for all."""
    key = "partial_rotary_factor"
    if not partial:
        for source in (beside, rope):
            if source.number(key, 1.0) != 1.0:
                source.problem(f"{key} {source.values[key]}")
        return None
    factor = (rope if key in rope.values else beside).number(key, 1.0)
    dim = int(_head_dim(beside) * factor)
    if factor > 1 or dim < 2 or dim % 2:
        rope.problem(
            f"{key} {factor:g} rotates {dim} of {_head_dim(beside)} channels, expected an even number"
        )
    return None if factor == 1 else dim


def _llama3(rope: ConfigReader, theta: float, rotary_dim: int | None, original: int) -> RopeConfig:
    result = RopeConfig(
        theta=theta,
        type="llama3",
        rotary_dim=rotary_dim,
        factor=rope.number_not_null("factor", 1.0),
        low_freq_factor=rope.number_not_null("low_freq_factor", 1.0),
        high_freq_factor=rope.number_not_null("high_freq_factor", 4.0),
        original_max_position_embeddings=original,
    )
    if result.high_freq_factor <= result.low_freq_factor:
        rope.problem(
            f"llama3 rope has high_freq_factor {result.high_freq_factor:g} <= "
            f"low_freq_factor {result.low_freq_factor:g}"
        )
    return result


def _yarn(
    rope: ConfigReader, theta: float, rotary_dim: int | None, original: int, positions: int
) -> RopeConfig:
    """Reads YaRN. Section 3.4 of arXiv 2309.00071 gives the default of the attention factor."""
    if theta <= 1:
        rope.problem(f"yarn rope has rope_theta {theta:g}, expected more than 1")
    factor = rope.number("factor", positions / original)

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    attention_factor = growth(1.0)
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        scales = (rope.number_not_null(key, 1.0) for key in ("mscale", "mscale_all_dim"))
        attention_factor = growth(next(scales)) / growth(next(scales))
    return RopeConfig(
        theta=theta,
        type="yarn",
        rotary_dim=rotary_dim,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.switch("truncate", True),
        attention_factor=rope.number("attention_factor", attention_factor),
    )


def _longrope(rope: ConfigReader, theta: float, dim: int, original: int, positions: int) -> RopeConfig:
    """Reads LongRoPE.

    Texts beyond the original context have other factors for all their tokens, those in a cache included. So
    the model has the original context (``ModelConfig.max_position_embeddings``).
    """
    factor = rope.number("factor", positions / original)
    attention_factor = 1.0
    if factor > 1 and original > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        type="longrope",
        rotary_dim=dim,
        original_max_position_embeddings=original,
        channel_factors=rope.numbers("short_factor", dim // 2),
        long_channel_factors=rope.numbers("long_factor", dim // 2),
        attention_factor=rope.number("attention_factor", attention_factor),
    )
