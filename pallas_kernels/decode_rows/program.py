"""The lane programs between two graded products of a decode step: residual and norm, and SwiGLU."""

import dataclasses
import math
from typing import Any, NamedTuple

from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value
from pallas_kernels.lanes.rows import (
    FeaturePair,
    Rows,
    load_bfloat16_pair,
    locate,
    store_partial_sum,
    store_rounded,
    sum_pairs,
)
from pallas_kernels.router.grading_factor import inverse_grading_factor


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of one launch.

    Attributes:
      rows: How the rows of the output are cut into CTAs.
      num_partials: Number of partial sums of the input.
      stored_features: Number of features of the input, padding included.
      terms: Number of rows of features that a row of a partial sum consists of (see ``Activations``).
    """

    rows: Rows
    num_partials: int
    stored_features: int
    terms: int = 1

    def index(self, row: Value, feature: Value) -> Value:
        """Returns the index of a row's feature in the first partial sum."""
        return row * (self.terms * self.stored_features) + feature

    @property
    def stride(self) -> int:
        """Distance, in numbers, from a feature in one partial sum to the same feature in the next."""
        return self.rows.rows * self.terms * self.stored_features

    def sum(self, isa: Instructions, ref: Any, index: Value) -> list[Value]:
        """Adds up two neighbouring features, of which ``index`` is the first, over partial sums and terms."""
        return sum_pairs(
            isa,
            ref,
            index,
            self.stride,
            self.num_partials,
            terms=self.terms,
            term_stride=self.stored_features,
        )


@dataclasses.dataclass(frozen=True)
class AddNormRefs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      x: bfloat16 ``[rows, N]``: the residual stream.
      partials: float32 ``[partials, rows, terms features]``: partial sums of the update of the stream.
      norm_scale: bfloat16 ``[N]``: learned scale of the norm.
      total: Output, bfloat16 ``[rows, N]``: the updated residual stream.
      values: Output, bfloat16 ``[rows, N]``: the updated stream times the norm scale.
      square_partials: Output, float32 ``[rows, blocks_per_row]``: their sum is the mean square of ``total``.
      shared: The shared memory.
    """

    x: Any
    partials: Any
    norm_scale: Any
    total: Any
    values: Any
    square_partials: Any
    shared: Any


def add_norm_program(isa: Instructions, shape: Shape, refs: AddNormRefs) -> None:
    """Adds an update to the residual stream, scales the sum for the norm, and sums its squares."""
    rows = shape.rows
    pair = locate(isa, rows)
    x = load_bfloat16_pair(isa, refs.x, pair.row * rows.features + pair.feature)
    norm_scale = load_bfloat16_pair(isa, refs.norm_scale, pair.feature)
    first = shape.index(pair.row, pair.feature)
    update = shape.sum(isa, refs.partials, first)
    store_sum_and_norm(isa, rows, pair, refs, x, update, norm_scale)


def store_sum_and_norm(
    isa: Instructions,
    rows: Rows,
    pair: FeaturePair,
    refs: AddNormRefs,
    x: list[Value],
    update: list[Value],
    norm_scale: list[Value],
) -> None:
    """Writes the three outputs of ``add_norm_program`` for the lane's two features."""
    total = store_rounded(isa, rows, pair, refs.total, [a + b for a, b in zip(x, update, strict=True)])
    values = [a * b for a, b in zip(total, norm_scale, strict=True)]
    store_rounded(isa, rows, pair, refs.values, values)
    square = isa.multiply_add(total[0], total[0], total[1] * total[1]) * (1 / rows.features)
    store_partial_sum(isa, rows, pair, refs.shared, refs.square_partials, square)


@dataclasses.dataclass(frozen=True)
class SwigluRefs:
    """Arrays in global memory, and the shared memory of the CTA.

    Attributes:
      partials: float32 ``[partials, rows, features]``: partial sums of the gate's features, then of up's.
      values: Output, bfloat16 ``[rows, N]``.
      shared: The shared memory, not used.
      probabilities: float32 ``[rows]``, the probabilities of experts; None without experts.
    """

    partials: Any
    values: Any
    shared: Any
    probabilities: Any = None


class Clamp(NamedTuple):
    """Options of the clamped SwiGLU: ``(up + 1) * gate * sigmoid(alpha * gate)``.

    Attributes:
      alpha: Factor of the gate in the sigmoid.
      limit: Largest gate, and largest absolute value of ``up``, before everything else.
    """

    alpha: float
    limit: float


def swiglu_program(isa: Instructions, shape: Shape, refs: SwigluRefs, clamp: Clamp | None = None) -> None:
    """Computes ``silu(gate) * up``, where ``silu(a) = a / (1 + exp(-a))``; or the clamped SwiGLU.

    With probabilities, ``gate`` and ``up`` are divided by an expert's grading factor, and the result is
    multiplied by its probability.
    """
    rows = shape.rows
    pair = locate(isa, rows)
    first = shape.index(pair.row, pair.feature)
    probability = None
    if refs.probabilities is not None:
        address = isa.global_address(refs.probabilities) + isa.widen(pair.row << 2)
        (probability,) = isa.load_global(address, kind="f32")
    gate = shape.sum(isa, refs.partials, first)
    up = shape.sum(isa, refs.partials, first + rows.features)
    if probability is not None:
        inverse = inverse_grading_factor(isa, probability)
        gate, up = [a * inverse for a in gate], [a * inverse for a in up]
    if clamp is not None:
        gate = [_at_most(isa, a, clamp.limit) for a in gate]
        up = [_at_least(isa, _at_most(isa, a, clamp.limit), -clamp.limit) + 1.0 for a in up]
    if probability is not None:
        up = [a * probability for a in up]
    to_log2 = -math.log2(math.e) * (1.0 if clamp is None else clamp.alpha)
    activated = [isa.divide(a * b, isa.exp2(a * to_log2) + 1.0) for a, b in zip(gate, up, strict=True)]
    store_rounded(isa, rows, pair, refs.values, activated)


def _at_most(isa: Instructions, value: Value, limit: float) -> Value:
    """Returns the lesser of an ``f32`` and a limit; NaN for NaN."""
    bound = isa.constant(limit, "f32")
    return isa.select(bound < value, bound, value)


def _at_least(isa: Instructions, value: Value, limit: float) -> Value:
    """Returns the greater of an ``f32`` and a limit; NaN for NaN."""
    bound = isa.constant(limit, "f32")
    return isa.select(value < bound, bound, value)
