"""Bits that graded decoding would read, counted with numpy from the activations of a dense forward pass."""

import jax
import numpy as np

from grinqh_jax.model import apply, decoder


@jax.jit
def linear_inputs(model, tokens):
    """Returns the inputs of every linear layer in a forward pass at full precision, by layer name."""
    dense, seen = apply.Dense(), {}

    def keep(name, linear, x):
        seen[name] = x.array
        return dense(name, linear, x)

    model(tokens, keep)
    return seen


def bits_to_read(model, tokens, thresholds):
    """Returns mean bits per weight ``[rows, positions, linears]``, computed without the library's grading."""
    inputs, bits = linear_inputs(model, tokens), []
    for name in decoder.linear_names(model.config):
        reached = np.abs(np.asarray(inputs[name]))[..., None] >= np.asarray(thresholds[name])[:, None, None]
        bits.append(2 * reached.sum(axis=-1).mean(axis=-1))
    return np.stack(bits, axis=-1)
