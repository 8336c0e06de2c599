"""The gated delta net: causal mixing with a state of fixed size in place of keys and values.

Each head has a memory S, a matrix from keys to values. A token with query q, key k and value v first lets the
memory decay, then replaces what it holds for k by a share beta of v, and reads the result:

    S <- exp(g) S;    S <- S + k (beta (v - k^T S))^T;    o = q^T S

Source: arXiv 2412.06464. All of this is computed in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from grinqh_jax.model.fixed_states import RecurrentState
from grinqh_jax.model.layer_spec import DeltaHeads
from grinqh_jax.model.norm import rms_norm
from pallas_kernels import Activations

CHUNK = 64
"""Number of tokens that prefill reads into a memory at once. The products within a chunk grow with its
square, and the chunks are read one after another."""

NORM_EPS = 1e-6
"""Epsilon of the L2 norms of queries and keys, which no configuration states."""


class DeltaNet(nnx.Module):
    """The parameters of a gated delta net beside its projections, and its computation.

    Attributes:
      convolution: ``[channels, 1, width]``, a causal filter for each channel of queries, keys and values.
      log_decay: ``[value_heads]``; the rate of decay of a head is its exponential.
      step_bias: ``[value_heads]``, added to the outputs that set the decay of a token.
    """

    def __init__(
        self,
        convolution: Float[Array, "c 1 w"],
        log_decay: Float[Array, "heads"],
        step_bias: Float[Array, "heads"],
    ):
        self.convolution = nnx.Param(convolution)
        self.log_decay = nnx.Param(log_decay)
        self.step_bias = nnx.Param(step_bias)

    @jax.named_scope("delta_net")
    def __call__(
        self,
        heads: DeltaHeads,
        outputs: Activations,
        norm_scale: Float[Array, "dv"],
        eps: float,
        state: RecurrentState | None = None,
    ) -> tuple[Activations, RecurrentState]:
        """Mixes the new tokens with all earlier ones.

        Args:
          heads: Sizes of the heads.
          outputs: Outputs of ``delta_in`` ``[b, t, n]``: queries, keys and values; gates; a logit of beta for
            each value head; a step for each value head, which sets its decay.
          norm_scale: Scale of the norm of each value head.
          eps: Epsilon of this norm.
          state: State after the earlier tokens; None if the new tokens are the whole sequence.

        Returns:
          ``(inputs of delta_out [b, t, value_heads_dv], state)``.
        """
        x = outputs.array
        batch, tokens, _ = x.shape
        if state is None:
            state = RecurrentState.zeros(heads, batch)
        channels, values = heads.channels, heads.value_heads * heads.value_dim
        qkv, gate, beta, step = jnp.split(
            x, (channels, channels + values, channels + values + heads.value_heads), axis=-1
        )
        qkv, convolution = _convolved(qkv.astype(jnp.float32), self.convolution[...], state)
        keys = heads.key_heads * heads.key_dim
        q, k, v = jnp.split(qkv, (keys, 2 * keys), axis=-1)
        q, k = (_unit(a.reshape(batch, tokens, heads.key_heads, heads.key_dim)) for a in (q, k))
        # Consecutive value heads share a key head.
        q, k = (jnp.repeat(a, heads.value_heads // heads.key_heads, axis=2) for a in (q, k))
        q = q * heads.key_dim**-0.5
        v = v.reshape(batch, tokens, heads.value_heads, heads.value_dim)
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        decay = jax.nn.softplus(step.astype(jnp.float32) + self.step_bias[...])
        decay = -jnp.exp(self.log_decay[...].astype(jnp.float32)) * decay
        if state.counts is not None:
            # A token that does not count writes nothing, and the memory does not decay.
            counts = (jnp.arange(tokens) < state.counts[:, None])[..., None]
            beta, decay = jnp.where(counts, beta, 0), jnp.where(counts, decay, 0)
        read = _one_token if tokens == 1 else _chunks
        mixed, memory = read(q, k, v, beta, decay, state.memory)
        mixed = rms_norm(mixed, norm_scale, eps).reshape(batch, tokens, values)
        mixed = mixed * jax.nn.silu(gate.astype(jnp.float32))
        return Activations.of(mixed.astype(x.dtype)), RecurrentState(convolution, memory, state.counts)


def _convolved(
    x: Float[Array, "b t c"], filters: Float[Array, "c 1 w"], state: RecurrentState
) -> tuple[Float[Array, "b t c"], Float[Array, "b w1 c"]]:
    """Returns the SiLU of the causal convolution, and the last inputs that count, for the next call."""
    tokens, width = x.shape[1], filters.shape[-1]
    inputs = jnp.concatenate([state.convolution, x], axis=1)
    taps = filters[:, 0].astype(jnp.float32)
    y = sum(inputs[:, i : i + tokens] * taps[:, i] for i in range(width))
    if state.counts is None:
        last = inputs[:, tokens:]
    else:
        indices = state.counts[:, None] + jnp.arange(width - 1)
        last = jnp.take_along_axis(inputs, indices[..., None], axis=1)
    return jax.nn.silu(y), last


def _unit(x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + NORM_EPS)


def _one_token(
    q: Float[Array, "b 1 h dk"],
    k: Float[Array, "b 1 h dk"],
    v: Float[Array, "b 1 h dv"],
    beta: Float[Array, "b 1 h"],
    decay: Float[Array, "b 1 h"],
    memory: Float[Array, "b h dk dv"],
) -> tuple[Float[Array, "b 1 h dv"], Float[Array, "b h dk dv"]]:
    """Reads one token as the module's docstring says; returns its output and the memory."""
    q, k, v, beta, decay = (a[:, 0] for a in (q, k, v, beta, decay))
    memory = memory * jnp.exp(decay)[..., None, None]
    held = jnp.sum(memory * k[..., None], axis=-2)
    memory = memory + k[..., None] * (beta[..., None] * (v - held))[..., None, :]
    return jnp.sum(memory * q[..., None], axis=-2)[:, None], memory


def _chunks(
    q: Float[Array, "b t h dk"],
    k: Float[Array, "b t h dk"],
    v: Float[Array, "b t h dv"],
    beta: Float[Array, "b t h"],
    decay: Float[Array, "b t h"],
    memory: Float[Array, "b h dk dv"],
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """Reads many tokens, a chunk after another, as the recurrence does (section 3.3 of arXiv 2412.06464).

    With the sums ``c_i`` of the decays in a chunk and the memory S before it, the rows that a chunk writes
    solve ``u_i = beta_i (v_i - exp(c_i) S^T k_i - sum_{j < i} exp(c_i - c_j) (k_i . k_j) u_j)``.
    """
    tokens = q.shape[1]
    size = min(CHUNK, tokens)
    padding = -tokens % size

    def chunked(a: jax.Array) -> jax.Array:  # [b, t, h, ...] to [chunks, b, h, size, ...]
        a = jnp.pad(a, ((0, 0), (0, padding), *((0, 0),) * (a.ndim - 2)))
        a = a.reshape(a.shape[0], -1, size, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))

    before = jnp.tril(jnp.ones((size, size), bool), -1)
    upto = jnp.tril(jnp.ones((size, size), bool))

    def product(subscripts: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *operands, precision="highest")

    def one_chunk(memory: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, beta, decay = chunk
        total = jnp.cumsum(decay, axis=-1)
        between = jnp.exp(jnp.where(upto, total[..., :, None] - total[..., None, :], -jnp.inf))
        system = jnp.where(before, product("bhik,bhjk->bhij", k, k) * between, 0) * beta[..., None]
        held = product("bhik,bhkv->bhiv", k * jnp.exp(total)[..., None], memory)
        written = jax.lax.linalg.triangular_solve(
            system, beta[..., None] * (v - held), left_side=True, lower=True, unit_diagonal=True
        )
        scores = product("bhik,bhjk->bhij", q, k) * between
        read = product("bhik,bhkv->bhiv", q * jnp.exp(total)[..., None], memory)
        read = read + product("bhij,bhjv->bhiv", scores, written)
        left = jnp.exp(total[..., -1:] - total)[..., None]
        memory = memory * jnp.exp(total[..., -1])[..., None, None]
        return memory + product("bhik,bhiv->bhkv", k * left, written), read

    memory, read = jax.lax.scan(one_chunk, memory, tuple(chunked(a) for a in (q, k, v, beta, decay)))
    read = jnp.moveaxis(read, (0, 2), (1, 3))  # [b, chunks, size, h, dv]
    return read.reshape(read.shape[0], -1, *read.shape[3:])[:, :tokens], memory
