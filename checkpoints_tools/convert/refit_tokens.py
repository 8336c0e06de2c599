"""Chooses the tokens that weights are refitted to, and the projections that are refitted, within the memory.

A projection is refitted if there are more scored tokens than it has inputs, which is known before the
conversion begins. The other projections are rounded as they are, and the conversion names them.

Memory peaks at ``down``, which has the most inputs. On a CPU, where host and device share their memory,
Qwen3-8B (hidden 4096, intermediate 12288, 16,384 tokens, float32) needs about 5 GiB there:

* 0.5 GiB: the residual stream of all windows, original and graded (2 x 16,384 x 4096 x 4 bytes);
* 1.5 GiB: the inputs of ``down``, original and graded (2 x 16,384 x 12288 x 4 bytes);
* 1.1 GiB: two K x K matrices (2 x 12288 x 12288 x 4 bytes): ``A`` of ``least_squares`` and a product that is
  added to it, or ``A`` and its factor, or the factor and a triangular solve's copy of it;
* 0.7 GiB, 0.1 GiB and 0.2 GiB: the original layer, the kernel that is read, and the codes of the layer;
* the process itself, and one window or one range of outputs in flight.

The measured peak was 4.7 GiB, 0.2 GiB of it the process, with synthetic states, a synthetic layer and one
window multiplied. Since then the exact states of 2,048 tokens of text of another kind (``refitted_codes``)
add 0.1 GiB. Llama-3.1-8B (intermediate 14336, 17,408 tokens) needs 0.9 GiB more. In bfloat16 Qwen3-8B is
fitted to all of its share of 32,768 calibration tokens, 24,576: 1.5 GiB of states and 1.1 GiB of matrices,
all on the device.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int32

from checkpoints_tools.calibration.statistics import first_scored_position
from grinqh_jax.model.apply import in_head
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import linear_shapes
from grinqh_jax.model.layer_spec import HEAD
from grinqh_jax.model.parameters import projections

TOKENS = 32768
"""Maximum number of tokens to fit to, which bounds the time."""

MOST_TOKENS_PER_INPUT = 8
"""Maximum number of tokens for each input of the widest projection. It bounds the time for a small model."""

ENOUGH_TOKENS = 12288
"""Number of tokens up to which ``MOST_TOKENS_PER_INPUT`` does not count. With 12,288 instead of 24,576
tokens the divergence of SmolLM2-135M (1,536 inputs) at 2 and 3 bits changed by less than 1 %, on average over
four texts (``benchmarks/notes/2026-11-29-calibration-texts.md``)."""

LEAST_TOKENS = 4096
"""Minimum number of tokens for any refit. Fewer tokens do not represent the inputs that a layer may get."""

STATE_BYTES = 1 << 31
"""Maximum size of the states of the tokens, original and graded together."""

MIXTURE_STATE_BYTES = 3 << 28
"""The same for mixtures of experts, of which a layer may take several GB (6.4 for gpt-oss-120b)."""

TOKENS_PER_INPUT = 1.25
"""Number of tokens for each input of the widest projection that are used even if their states exceed the
maximum. With fewer tokens than inputs that projection could not be refitted at all, and its matrix
``A`` needs as much memory as the states."""


def input_widths(config: ModelConfig) -> dict[str, int]:
    """Returns the number of inputs of each projection, equal in all layers, and of ``HEAD``.

    Projections of experts are left out: each expert gets only some of the tokens, and is not refitted.
    """
    experts = {projection.name for projection in projections(config).values() if projection.of_experts}
    widths = {
        HEAD if in_head(name) else name.rpartition(".")[2]: k
        for name, (k, _) in linear_shapes(config).items()
    }
    return {name: k for name, k in widths.items() if name not in experts}


def fitting_windows(
    windows: Int32[np.ndarray, "s t"],
    widths: Mapping[str, int],
    itemsize: int,
    state_bytes: int = STATE_BYTES,
) -> Int32[np.ndarray, "s2 t"]:
    """Returns the calibration windows that weights are fitted to: the first ones, at least one.

    Args:
      windows: Token ids.
      widths: Result of ``input_widths``.
      itemsize: Bytes of one number of a hidden state.
      state_bytes: Maximum size of the states of the tokens.
    """
    widest = max(widths.values())
    token_bytes = 2 * (widths[HEAD] + widest) * itemsize  # Residual stream, and inputs of the widest.
    most = min(TOKENS, max(ENOUGH_TOKENS, MOST_TOKENS_PER_INPUT * widest))
    tokens = min(most, max(state_bytes // token_bytes, int(TOKENS_PER_INPUT * widest)))
    return windows[: max(tokens // windows.shape[1], 1)]


def refitted_projections(windows: Int32[np.ndarray, "s t"], widths: Mapping[str, int]) -> list[str]:
    """Returns the projections that have enough tokens to be refitted, in the order of ``widths``.

    Args:
      windows: Result of ``fitting_windows``.
      widths: Result of ``input_widths``.
    """
    if windows.size < LEAST_TOKENS:
        return []
    return [name for name, k in widths.items() if _scored_tokens(windows) > k]


def shortage(windows: Int32[np.ndarray, "s t"], widths: Mapping[str, int]) -> str:
    """Returns a line that names the projections that are not refitted and the tokens that each needs.

    Args:
      windows: Result of ``fitting_windows``.
      widths: Result of ``input_widths``.

    Returns:
      The line; empty if all projections are refitted.
    """
    refitted = refitted_projections(windows, widths)
    needed = {name: max(k + 1, LEAST_TOKENS) for name, k in widths.items() if name not in refitted}
    if not needed:
        return ""
    names = ", ".join(f"{name} (needs {tokens:,} tokens)" for name, tokens in needed.items())
    return (
        f"weights were not refitted in {names}: the calibration text provides {_scored_tokens(windows):,}"
        " (at most three quarters of it are used)"
    )


def _scored_tokens(windows: Int32[np.ndarray, "s t"]) -> int:
    count, length = windows.shape
    return count * (length - first_scored_position(length))
