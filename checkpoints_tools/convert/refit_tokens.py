"""How many tokens weights are refitted to, which parts are refitted, and what memory that takes.

A projection is refitted if more tokens are counted than it has inputs, which is known before the conversion
begins; the others are rounded as they are, and named.

Memory is at its most at ``down``, which has the most inputs. In float32, as on a CPU, where host and device
are one, Qwen3-8B (hidden 4096, intermediate 12288, 16,384 tokens) takes some 5 GiB there:

* 0.5: the residual stream of all windows, in the original and graded (2 x 16,384 x 4096 x 4 bytes);
* 1.5: the inputs of ``down`` of both (2 x 16,384 x 12288 x 4);
* 1.1: two matrices K x K (2 x 12288 x 12288 x 4): ``A`` of ``refit`` and a product that is added to it, or
  ``A`` and its factor, or the factor and a triangular solve's copy of it;
* 0.7, 0.1 and 0.2: the original layer, the kernel that is read, the codes of the layer;
* the process itself, and a window or a block of outputs on its way.

(Measured: 4.7, 0.2 of it the process, with the states and the layer made up and one window multiplied.)
Llama-3.1-8B (intermediate 14336, 17,408 tokens) takes 0.9 more. In bfloat16 all that Qwen3-8B gets of 32,768
calibration tokens, 24,576, are fitted to: 1.5 GiB of states and 1.1 of matrices, all on the device.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from grinqh_jax.model.apply import HEAD, of_head

TOKENS = 32768
"""At most so many tokens are fitted to: time grows with them."""

LEAST_TOKENS = 4096
"""With fewer nothing is refitted: they show too few of the inputs that a layer may have."""

STATE_BYTES = 1 << 31
"""Tokens are fitted to until their states, of the original and graded model together, take so many bytes."""

TOKENS_PER_INPUT = 1.25
"""So many for each input of the widest projection are fitted to even if their states take more: its matrix
``A`` takes as much again, and with fewer tokens than inputs the projection could not be refitted at all."""


def input_widths(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """How many inputs each part has: the projections of a layer, alike in all layers, and ``HEAD``.

    Args:
      shapes: ``decoder.linear_shapes``.
    """
    return {HEAD if of_head(name) else name.rpartition(".")[2]: k for name, (k, _) in shapes.items()}


def fitting_windows(
    windows: Int32[np.ndarray, "s t"], widths: Mapping[str, int], itemsize: int
) -> Int32[np.ndarray, "s2 t"]:
    """The first of the calibration windows, as many as are fitted to (at least one).

    Args:
      windows: token ids.
      widths: of ``input_widths``.
      itemsize: bytes of one number of a hidden state.
    """
    widest = max(widths.values())
    token_bytes = 2 * (widths["qkv"] + widest) * itemsize  # the stream, and the inputs of the widest
    tokens = min(TOKENS, max(STATE_BYTES // token_bytes, int(TOKENS_PER_INPUT * widest)))
    return windows[: max(tokens // windows.shape[1], 1)]


def refitted_parts(windows: Int32[np.ndarray, "s t"], widths: Mapping[str, int]) -> list[str]:
    """The parts that have tokens enough to be refitted on these windows, in the order of ``widths``.

    Args:
      windows: of ``fitting_windows``.
      widths: of ``input_widths``.
    """
    if windows.size < LEAST_TOKENS:
        return []
    return [part for part, k in widths.items() if _counted_tokens(windows) > k]


def shortage(windows: Int32[np.ndarray, "s t"], widths: Mapping[str, int]) -> str:
    """One line that names the parts that are not refitted and the tokens that each needs; empty if all are.

    Args:
      windows, widths: as in ``refitted_parts``.
    """
    kept = refitted_parts(windows, widths)
    needed = {part: max(k + 1, LEAST_TOKENS) for part, k in widths.items() if part not in kept}
    if not needed:
        return ""
    parts = ", ".join(f"{part} (needs {tokens:,} tokens)" for part, tokens in needed.items())
    return (
        f"weights were not refitted in {parts}: {_counted_tokens(windows):,} of the calibration text are "
        "fitted to, three of four at most"
    )


def _counted_tokens(windows: Int32[np.ndarray, "s t"]) -> int:
    count, length = windows.shape
    return count * (length - first_scored_position(length))
