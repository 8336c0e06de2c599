"""Attention of a prompt's tokens to a KV cache by cuDNN, which keeps no scores in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grinqh_jax.model.by_token import MOST_DECODED
from pallas_kernels.lanes.device import target_device, unsupported_reason

WIDEST_HEAD, WIDEST_HEAD_BEFORE_HOPPER = 256, 128
"""Largest head that cuDNN multiplies, from compute capability 9.0 on and before."""

SINK_CHANNELS = SINK_SLOTS = 8
"""Channels and slots that sinks add. cuDNN wants a multiple of 8 channels; with 8 slots rows stay aligned."""

MOST_COMPUTED = 4
"""Number of slots for each query up to which cuDNN computes the scores of all slots. With more slots it gets
the lengths, and skips the slots behind them, but takes 1.2 to 1.3 times as long for the others. Wide prefill
chunks of an engine use more than half of their slots (``slots.shape``)."""


def lacks(
    queries: Float[Array, "b t heads head_dim"],
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> str | None:
    """Returns why cuDNN does not attend with these queries and options, or None if it does.

    Decode steps stay with the other implementations: a token must have the same bits among any number of new
    tokens, and GPU tests of cuDNN show this for chunks of 32 to 1,024 only.
    """
    tokens, head_dim = queries.shape[1], queries.shape[3] + (SINK_CHANNELS if sinks is not None else 0)
    if tokens <= MOST_DECODED:
        return "decode steps"
    if soft_cap is not None:
        return "a soft cap of the scores"
    if queries.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{queries.dtype}"
    device = target_device()
    if not isinstance(device, jax.Device):
        # Inside ``shard_map`` the target is a kind of device, and cuDNN has not run on several devices.
        # Without a GPU lowering could not ask for its capability.
        return "a mesh or a device that is not there"
    if (reason := unsupported_reason()) is not None:
        return reason
    hopper = float(device.compute_capability) >= 9
    if head_dim % 8 or head_dim > (WIDEST_HEAD if hopper else WIDEST_HEAD_BEFORE_HOPPER):
        return f"heads of {head_dim}"
    return None


def attend(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b s kv_heads head_dim"],
    values: Float[Array, "b s kv_heads head_dim"],
    visible: Bool[Array, "b 1 t s"],
    sinks: Float[Array, "heads"] | None = None,
    lengths: Int[Array, "b"] | None = None,
) -> Float[Array, "b t heads head_dim"]:
    """Attends from every query to the visible slots, with a softmax in float32.

    A slot that is not visible gets a score near the least finite number instead of none, so all keys and
    values must be finite.

    Args:
      queries, keys, values: Heads; ``heads / kv_heads`` consecutive query heads share a kv head. bfloat16 or
        float16.
      visible: Whether a query sees a slot; each query sees at least one.
      sinks: Sink of each query head, a score without a value; None for none.
      lengths: Number of leading slots of each row that hold all visible ones, at least 1; None if the row
        may use all. It changes the time alone.
    """
    head_dim = queries.shape[-1]
    if keys.shape[1] <= MOST_COMPUTED * queries.shape[1]:
        lengths = None
    if sinks is not None:
        queries, keys, values, visible = with_sink_slot(queries, keys, values, visible, sinks)
        lengths = None if lengths is None else lengths + SINK_SLOTS
    outputs = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=visible,
        scale=head_dim**-0.5,
        key_value_seq_lengths=None if lengths is None else jnp.minimum(lengths, keys.shape[1]),
        implementation="cudnn",
    )
    return outputs[..., :head_dim]


def with_sink_slot(
    queries: Float[Array, "b t heads head_dim"],
    keys: Float[Array, "b s kv_heads head_dim"],
    values: Float[Array, "b s kv_heads head_dim"],
    visible: Bool[Array, "b 1 t s"],
    sinks: Float[Array, "heads"],
) -> tuple[
    Float[Array, "b t heads more_dim"],
    Float[Array, "b more_s kv_heads more_dim"],
    Float[Array, "b more_s kv_heads more_dim"],
    Bool[Array, "b 1 t more_s"],
]:
    """Adds a visible first slot, whose value is 0 and whose score is the sink of the query head.

    cuDNN has no sinks. The slot is the first one because the order of cuDNN's sums follows the places of the
    slots: behind the last slot it would make the bits depend on the capacity. Its key is 1 in channels in
    which queries have their sink, and all other keys are 0. The sink is a sum of three numbers of the dtype
    of the queries: in bfloat16 as exact as in float32, in float16 to 1e-5.
    """
    left, parts, dtype = sinks.astype(jnp.float32) * queries.shape[-1] ** 0.5, [], jnp.finfo(queries.dtype)
    for _ in range(3):
        # XLA may remove a conversion to a narrower dtype and back, but not this rounding.
        parts.append(jax.lax.reduce_precision(left, dtype.nexp, dtype.nmant))
        left = left - parts[-1]
    channels = jnp.pad(jnp.stack(parts, axis=-1), ((0, 0), (0, SINK_CHANNELS - len(parts))))
    channels = jnp.broadcast_to(channels.astype(queries.dtype), (*queries.shape[:3], SINK_CHANNELS))
    more = (0, 0), (SINK_SLOTS, 0), (0, 0), (0, SINK_CHANNELS)
    sink_key = slice(-SINK_CHANNELS, -SINK_CHANNELS + len(parts))
    return (
        jnp.concatenate([queries, channels], axis=-1),
        jnp.pad(keys, more).at[:, 0, :, sink_key].set(1),
        jnp.pad(values, more),
        jnp.pad(visible, ((0, 0), (0, 0), (0, 0), (SINK_SLOTS, 0))).at[..., 0].set(True),
    )
