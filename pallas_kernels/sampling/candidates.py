"""Sizes and arrays that both launches of sampling share, and the order of logits and of candidates."""

import dataclasses
from typing import Any

from pallas_kernels.lanes.instructions import LANES, Instructions
from pallas_kernels.lanes.registers import Value

LANE_TOKENS = 4
"""Number of tokens of a chunk that a lane has."""

CHUNK = LANE_TOKENS * LANES
"""Number of tokens in a chunk, which one warp handles."""

SPREAD = 16
"""Number of parts of the vocabulary. Chunk c is in part ``c // (chunks / SPREAD)``, and neighbouring tokens
are in different parts, because likely tokens may be neighbours and a warp has consecutive chunks."""

LISTED_K = 128
"""Largest k of top-k for which the second launch lists the candidates, and the first one adds no noise."""

SCORING_THREADS = 256
SCORING_WARPS = SCORING_THREADS // LANES
"""Number of warps in a CTA of the first launch, each with one chunk."""

SIGN = 0x80000000

LARGEST = 3.4028234663852886e38
"""Largest finite float32."""

NO_KEY = -(2**31)
"""Key below those of all logits, of places after the end of the vocabulary."""

LEAST_KEY = NO_KEY + 1
"""Lower bound of the keys of all logits."""

NO_TOKEN = 2**31 - 1
"""Token of a candidate that does not exist. It loses against every token with the same score."""

STATISTICS = 5
"""Words for each chunk: largest key; sum of ``exp(logit - largest logit)``; score, token and key of the
candidate with the highest score. If the first launch did not score the row: infinity, and no token."""

Candidate = tuple[Value, Value, Value]
"""Score (``f32``), token, and key of a token that may be chosen."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a launch.

    Attributes:
      rows: Number of rows.
      vocabulary: Number of tokens.
      reordered: Whether logits have another order than tokens.
      biased: Whether there are biases.
      masked: Whether there is a mask of allowed tokens.
      penalized: Whether there are penalties.
    """

    rows: int
    vocabulary: int
    reordered: bool = False
    biased: bool = False
    masked: bool = False
    penalized: bool = False

    @property
    def blocks_per_row(self) -> int:
        """Number of CTAs of the first launch that share a row."""
        return self.chunks // SCORING_WARPS

    @property
    def chunks(self) -> int:
        """Number of chunks of a row, a multiple of ``SPREAD`` and of the warps of the first launch."""
        return -(-self.vocabulary // (CHUNK * SPREAD)) * SPREAD

    @property
    def mask_words(self) -> int:
        """Number of words of a row of the mask."""
        return -(-self.vocabulary // 32)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays in global memory that both launches read; None for those that ``Shape`` excludes.

    Attributes:
      logits: float32 ``[rows, vocabulary]``.
      temperature: float32 ``[rows]``; 0 for greedy choice.
      top_k: int32 ``[rows]``.
      top_p, min_p: float32 ``[rows]``.
      seed, position: int32 ``[rows]``, bits of the uint32 numbers that determine the noise.
      tokens: int32 ``[vocabulary]``, token of each logit.
      bias: float32 ``[rows, vocabulary]``, by token.
      allowed: int32 ``[rows, mask_words]``; bit ``t % 32`` of word ``t // 32`` is set if token t is allowed.
      repetition, presence, frequency: float32 ``[rows]``, penalties.
      history: int32 ``[rows, vocabulary]``, by token: twice the number of occurrences in the generated text,
        plus 1 if the prompt has the token.
    """

    logits: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    position: Any
    tokens: Any = None
    bias: Any = None
    allowed: Any = None
    repetition: Any = None
    presence: Any = None
    frequency: Any = None
    history: Any = None

    @classmethod
    def of(cls, shape: Shape, arrays: list[Any]) -> "Inputs":
        """Names the arrays of a launch, which come in the order of the attributes without those excluded."""
        return cls(**dict(zip(cls.names(shape), arrays, strict=True)))

    @staticmethod
    def names(shape: Shape) -> list[str]:
        """Returns the names of the arrays that a launch has."""
        excluded = set() if shape.reordered else {"tokens"}
        excluded |= set() if shape.biased else {"bias"}
        excluded |= set() if shape.masked else {"allowed"}
        excluded |= set() if shape.penalized else {"repetition", "presence", "frequency", "history"}
        return [field.name for field in dataclasses.fields(Inputs) if field.name not in excluded]


def load(isa: Instructions, ref: Any, index: Value, kind: Any = "i32") -> Value:
    """Loads a word of an array."""
    return isa.load_global(isa.global_address(ref) + isa.widen(index << 2), 1, kind)[0]


def lane_index(isa: Instructions, shape: Shape, chunk: Value, lane: Value) -> Value:
    """Returns the index of a lane's first logit in a chunk; the others follow at distances of ``LANES``."""
    part = shape.chunks // SPREAD
    return (chunk % part * SPREAD + chunk // part) * CHUNK + lane


def key_address(isa: Instructions, shape: Shape, keys: Any, row: Value, chunk: Value, lane: Value) -> Value:
    """Returns the address of the consecutive keys of a lane's logits in a chunk."""
    index = (row * shape.chunks + chunk) * CHUNK + lane * LANE_TOKENS
    return isa.global_address(keys) + isa.widen(index << 2)


def token_of(isa: Instructions, shape: Shape, inputs: Inputs, index: Value) -> Value:
    """Returns the token of a logit."""
    return load(isa, inputs.tokens, index) if shape.reordered else index


def key_of(isa: Instructions, number: Value) -> Value:
    """Returns an integer that orders as the number does. There is no NaN, and no negative zero."""
    bits = isa.float_to_bits(number)
    return isa.select(bits < 0, bits ^ 0x7FFFFFFF, bits)


def number_of(isa: Instructions, key: Value) -> Value:
    """Returns the number of a key."""
    return isa.bits_to_float(isa.select(key < 0, key ^ 0x7FFFFFFF, key))


def warp_max_key(isa: Instructions, key: Value) -> Value:
    """Returns the largest key of the warp."""
    return isa.reduce_max(key ^ SIGN) ^ SIGN


def no_candidate(isa: Instructions) -> Candidate:
    """Returns a candidate that loses against every other one."""
    return isa.constant(-float("inf"), "f32"), isa.constant(NO_TOKEN), isa.constant(NO_KEY)


def select_candidate(isa: Instructions, condition: Value, yes: Candidate, no: Candidate) -> Candidate:
    """Returns ``yes`` if ``condition`` holds, else ``no``."""
    return (
        isa.select(condition, yes[0], no[0]),
        isa.select(condition, yes[1], no[1]),
        isa.select(condition, yes[2], no[2]),
    )


def better(isa: Instructions, one: Candidate, other: Candidate) -> Candidate:
    """Returns the candidate with the higher score, or the lower token if the scores are equal."""
    wins = (other[0] < one[0]) | (~(one[0] < other[0]) & (one[1] < other[1]))
    return select_candidate(isa, wins, one, other)


def best_of_warp(isa: Instructions, candidate: Candidate) -> Candidate:
    """Returns the best candidate of the warp, in every lane."""
    for distance in (1, 2, 4, 8, 16):
        score, token, key = (isa.shuffle_xor(part, distance) for part in candidate)
        candidate = better(isa, (score, token, key), candidate)
    return candidate
