"""Attention of a prompt's tokens to a KV cache by cuDNN, which keeps no scores in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grinqh_jax.model.by_token import MOST_DECODED
from pallas_kernels.lanes.device import target_device, unsupported_reason

WIDEST_HEAD, WIDEST_HEAD_BEFORE_HOPPER = 256, 128
"""Largest head that cuDNN multiplies, from compute capability 9.0 on and before."""


def lacks(
    queries: Float[Array, "b t heads head_dim"],
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
) -> str | None:
    """Returns why cuDNN does not attend with these queries and options, or None if it does.

    Decode steps stay with the other implementations: a token must have the same bits among any number of new
    tokens, and GPU tests of cuDNN show this for chunks of 32 to 1,024 only.
    """
    tokens, head_dim = queries.shape[1], queries.shape[3]
    if tokens <= MOST_DECODED:
        return "decode steps"
    if soft_cap is not None:
        return "a soft cap of the scores"
    if sinks is not None:
        return "sinks"
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
) -> Float[Array, "b t heads head_dim"]:
    """Attends from every query to the visible slots, with a softmax in float32.

    A slot that is not visible gets a score near the least finite number instead of none, so all keys and
    values must be finite.

    Args:
      queries, keys, values: Heads; ``heads / kv_heads`` consecutive query heads share a kv head. bfloat16 or
        float16.
      visible: Whether a query sees a slot; each query sees at least one.
    """
    return jax.nn.dot_product_attention(queries, keys, values, mask=visible, implementation="cudnn")
