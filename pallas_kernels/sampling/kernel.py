"""The two launches that choose a token of each row: arguments, and the arrays of the kernels."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.lanes import device
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.launch import lane_kernel
from pallas_kernels.sampling import scoring, selection
from pallas_kernels.sampling.candidates import CHUNK, SCORING_THREADS, STATISTICS, Inputs, Shape

MAX_ELEMENTS = 2**29
"""Largest number of logits, because their byte offsets have 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """Sampling parameters of B rows over a vocabulary of V tokens; None leaves one out of the kernel.

    Attributes:
      temperature: float32 ``[B]``; 0 selects the largest logit, and the lowest token among equal ones.
      top_k: int32 ``[B]``; keeps the k largest logits and those equal to the last of them; 0 keeps all.
      top_p: float32 ``[B]``; keeps the fewest largest logits, among those that top-k keeps, whose
        probabilities sum to at least ``top_p``, and those equal to the last of them; 1 keeps all.
      min_p: float32 ``[B]``; keeps tokens at least this fraction as likely as the most likely one.
      seed: uint32 ``[B]``; determines the noise together with ``position``.
      position: int32 ``[B]``.
      bias: float32 ``[B, V]``, by token, added to the logits first.
      repetition, presence, frequency: float32 ``[B]``: penalties, after the bias. ``repetition`` divides
        positive logits of tokens in the history and multiplies others; the other two are subtracted for
        generated tokens, ``frequency`` once for each occurrence.
      history: int32 ``[B, V]``, by token: twice the number of occurrences in the generated text, plus 1 if
        the prompt has the token. None for no penalties.
      allowed: uint32 ``[B, ceil(V / 32)]``; bit ``t % 32`` of word ``t // 32`` is set if token t may be
        chosen. A row without an allowed token gives a token that is not allowed.
    """

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    min_p: Float[Array, "b"]
    seed: UInt32[Array, "b"]
    position: Int[Array, "b"]
    bias: Float[Array, "b v"] | None = None
    repetition: Float[Array, "b"] | None = None
    presence: Float[Array, "b"] | None = None
    frequency: Float[Array, "b"] | None = None
    history: Int[Array, "b v"] | None = None
    allowed: UInt32[Array, "b words"] | None = None


def supports(logits: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Returns why the kernels cannot run for logits ``[B, V]`` on the target device, or None if they can."""
    if jnp.dtype(logits.dtype) != jnp.float32:
        return f"takes float32 logits, not {jnp.dtype(logits.dtype).name}"
    if logits.size > MAX_ELEMENTS:
        return f"addresses at most {MAX_ELEMENTS} logits, not {logits.size}"
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]  # set when jax is imported
        return "makes the random numbers of jax_threefry_partitionable=True, which is switched off"
    return device.unsupported_reason()


def sample_tokens(
    logits: Float[Array, "b v"], parameters: SamplingParameters, token_ids: Int[Array, "v"] | None = None
) -> Int[Array, "b"]:
    """Chooses the next token of every row: the largest sum of a kept logit and Gumbel noise.

    A row's token depends on the row's logits and parameters alone. The noise of a token is element ``token``
    of ``jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), [V])``. A NaN or Inf counts as
    the largest finite number.

    Args:
      logits: float32, in any order.
      parameters: Sampling parameters of each row.
      token_ids: int32, the token of each logit; None if the logits are in the order of the tokens.

    Returns:
      int32 ``[B]``.
    """
    shape = shape_of(logits.shape, parameters, token_ids)
    arrays = inputs(shape, logits, parameters, token_ids)
    keys, statistics = _scoring_kernel(shape)(*arrays)
    (chosen,) = _selection_kernel(shape)(*arrays, keys, statistics)
    return chosen


def shape_of(
    size: tuple[int, ...], parameters: SamplingParameters, token_ids: Int[Array, "v"] | None
) -> Shape:
    """Returns the sizes of the launches for logits of shape ``size``."""
    rows, vocabulary = size
    return Shape(
        rows,
        vocabulary,
        reordered=token_ids is not None,
        biased=parameters.bias is not None,
        masked=parameters.allowed is not None,
        penalized=parameters.history is not None,
    )


def inputs(
    shape: Shape,
    logits: Float[Array, "b v"],
    parameters: SamplingParameters,
    token_ids: Int[Array, "v"] | None,
) -> list[jax.Array]:
    """Returns the arrays of ``candidates.Inputs`` that the shape has, in their order."""
    values: dict[str, Any] = {
        **{field.name: getattr(parameters, field.name) for field in dataclasses.fields(parameters)},
        "logits": logits,
        "tokens": token_ids,
    }
    return [_words(values[name]) for name in Inputs.names(shape)]


def _words(array: jax.Array) -> jax.Array:
    """Returns an array of integers as int32 with the same bits, and one of floats unchanged."""
    if array.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(array, jnp.int32)
    return array if array.dtype == jnp.float32 else array.astype(jnp.int32)


@functools.cache
def _scoring_kernel(shape: Shape):
    """Builds the first launch. ``scoring.Refs`` describes its arguments and results."""

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        *arrays, keys, statistics, shared = refs
        scoring.scoring_program(isa, shape, scoring.Refs(Inputs.of(shape, arrays), keys, statistics, shared))

    return lane_kernel(
        "sampling_scores_kernel",
        program,
        outputs=[
            jax.ShapeDtypeStruct((shape.rows, shape.chunks, CHUNK), jnp.int32),
            jax.ShapeDtypeStruct((shape.rows, STATISTICS, shape.chunks), jnp.int32),
        ],
        blocks=shape.rows * shape.blocks_per_row,
        threads=SCORING_THREADS,
        shared_bytes=16,  # Not used, but the launch needs a shared array that is not empty.
    )


@functools.cache
def _selection_kernel(shape: Shape):
    """Builds the second launch. ``selection.Refs`` describes its arguments and results."""

    def program(isa: Instructions, refs: Sequence[Any]) -> None:
        *arrays, keys, statistics, chosen, shared = refs
        refs_of = selection.Refs(Inputs.of(shape, arrays), keys, statistics, chosen, shared)
        selection.selection_program(isa, shape, refs_of)

    return lane_kernel(
        "sampling_selection_kernel",
        program,
        outputs=[jax.ShapeDtypeStruct((shape.rows,), jnp.int32)],
        blocks=shape.rows,
        threads=selection.THREADS,
        shared_bytes=selection.shared_bytes(shape),
    )
