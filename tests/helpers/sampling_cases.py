"""Random cases of sampling, the kernel's programs on the emulator, and an oracle in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lanes.emulator import NumpyInstructions
from pallas_kernels.sampling import SamplingParameters, kernel, scoring, selection
from pallas_kernels.sampling.candidates import CHUNK, SCORING_THREADS, STATISTICS, Inputs

UNWRITTEN = 12345678

ROUNDING = 2e-5
"""Difference of scores, and of sums of probabilities relative to ``top_p``, that rounding may decide."""


def emulate(logits, parameters: SamplingParameters, token_ids=None) -> np.ndarray:
    """Returns the tokens as ``sample_tokens`` does; fails if the programs leave an output unwritten."""
    shape = kernel.shape_of(logits.shape, parameters, token_ids)
    operands = kernel.inputs(shape, jnp.asarray(logits), parameters, token_ids)
    arrays = [np.ascontiguousarray(np.asarray(a)) for a in operands]
    keys = np.full((shape.rows, shape.chunks, CHUNK), UNWRITTEN, np.int32)
    statistics = np.full((shape.rows, STATISTICS, shape.chunks), UNWRITTEN, np.int32)
    blocks = shape.rows * shape.blocks_per_row
    isa = NumpyInstructions(blocks=blocks, threads=SCORING_THREADS, shared_bytes=16)
    *refs, keys_ref, statistics_ref = (isa.array(a) for a in (*arrays, keys, statistics))
    inputs = Inputs.of(shape, refs)
    scoring.scoring_program(isa, shape, scoring.Refs(inputs, keys_ref, statistics_ref, None))
    isa.finish()
    assert not (keys == UNWRITTEN).any()
    assert not (statistics == UNWRITTEN).any()
    chosen = np.full(shape.rows, UNWRITTEN, np.int32)
    shared = selection.shared_bytes(shape)
    isa = NumpyInstructions(blocks=shape.rows, threads=selection.THREADS, shared_bytes=shared)
    *refs, chosen_ref = (isa.array(a) for a in (*arrays, keys, statistics, chosen))
    *refs, keys_ref, statistics_ref = refs
    inputs = Inputs.of(shape, refs)
    selection.selection_program(
        isa, shape, selection.Refs(inputs, keys_ref, statistics_ref, chosen_ref, None)
    )
    isa.finish()
    assert not (chosen == UNWRITTEN).any()
    return chosen


@dataclasses.dataclass(frozen=True)
class Case:
    """One row, as numpy. Biases, counts and mask are by token; None for none."""

    logits: np.ndarray
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    bias: np.ndarray | None = None
    penalties: tuple[float, float, float] | None = None
    in_prompt: np.ndarray | None = None
    generated: np.ndarray | None = None
    allowed: np.ndarray | None = None


def parameters(cases: list[Case]) -> SamplingParameters:
    """Returns the kernel's parameters of rows, which all have the same optional arrays."""

    def column(name, dtype):
        return jnp.asarray([getattr(case, name) for case in cases], dtype)

    options = {}
    if cases[0].bias is not None:
        options["bias"] = column("bias", jnp.float32)
    if cases[0].penalties is not None:
        columns = zip(*(case.penalties for case in cases), strict=True)
        names = ("repetition", "presence", "frequency")
        options |= {name: jnp.float32(values) for name, values in zip(names, columns, strict=True)}
        packed = [2 * case.generated + case.in_prompt for case in cases]
        options["history"] = jnp.asarray(np.array(packed), jnp.int32)
    if cases[0].allowed is not None:
        options["allowed"] = jnp.asarray(mask_words(np.array([case.allowed for case in cases])))
    return SamplingParameters(
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        seed=column("seed", jnp.uint32),
        position=column("position", jnp.int32),
        **options,
    )


def mask_words(allowed: np.ndarray) -> np.ndarray:
    """Packs bool ``[rows, V]`` into uint32 ``[rows, ceil(V / 32)]``, 32 tokens a word."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def adjusted(case: Case) -> np.ndarray:
    """Returns the logits after bias, penalties and mask, float64."""
    logits = case.logits.astype(np.float64)
    if case.bias is not None:
        logits = (case.logits + case.bias).astype(np.float64)
    if case.penalties is not None:
        repetition, presence, frequency = case.penalties
        seen = case.in_prompt | (case.generated > 0)
        logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits = logits - np.where(case.generated > 0, presence, 0) - frequency * case.generated
    return logits if case.allowed is None else np.where(case.allowed, logits, -np.inf)


def oracle(case: Case) -> set[int]:
    """Returns the tokens that may be chosen: one, or several where rounding decides."""
    logits = adjusted(case)
    if not case.temperature > 0:
        best = np.flatnonzero(logits >= logits.max() - ROUNDING * (1e-3 + abs(logits.max())))
        return set(best.tolist()) if case.penalties is not None else {int(np.argmax(logits))}
    key = jax.random.fold_in(jax.random.key(np.uint32(case.seed)), case.position)
    uniform = jax.random.uniform(key, logits.shape, minval=np.finfo(np.float32).tiny)
    noise = -np.log(-np.log(np.asarray(uniform, np.float64)))
    scaled = logits * np.float64(np.float32(1) / np.float32(case.temperature))
    chosen = set()
    for slack in (-ROUNDING, 0.0, ROUNDING):
        score = np.where(kept(scaled, case, slack), scaled + noise, -np.inf)
        close = score >= score.max() - ROUNDING * (1 + abs(score.max()))
        chosen |= set(np.flatnonzero(close).tolist())
    return chosen


def kept(scaled: np.ndarray, case: Case, slack: float) -> np.ndarray:
    """Returns which tokens the filters keep, if rounding moves their cutoffs by ``slack``."""
    kth = np.sort(scaled)[-min(case.top_k, scaled.size)] if case.top_k > 0 else -np.inf
    keep = scaled >= kth - abs(slack) * case.top_k.bit_length() * 1e-2
    if case.top_p < 1:
        weights = np.where(scaled >= kth, np.exp(scaled - scaled.max()), 0)
        ranked = np.argsort(-scaled, kind="stable")
        preceding = np.concatenate([[0], np.cumsum(weights[ranked])[:-1]])
        values, first = np.unique(-scaled[ranked], return_index=True)
        above = dict(zip(values.tolist(), preceding[first].tolist(), strict=True))
        share = np.array([above[value] for value in (-scaled).tolist()]) / weights.sum()
        keep &= (share < np.float32(case.top_p) + slack) | (scaled == scaled.max())
    if case.min_p > 0:
        keep &= scaled >= scaled.max() + np.log(np.float64(np.float32(case.min_p))) - slack
    return keep
