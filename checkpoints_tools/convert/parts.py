"""The parts that a conversion writes, and how a stage saves one.

=====================  ==========================================================  ========================
part                   leaves                                                      written by
=====================  ==========================================================  ========================
``embed``              the embedding                                               ``write_embedding``
``layers.{i}``         codes of the projections that are not refitted              ``measure_layers``
``layers.{i}.{name}``  codes of a projection of experts, which may take 2 GB       ``measure_layers``
``lm_head``            codes of the output projection, unless it is refitted       ``measure_layers``
``grading``            norms, biases, routers, thresholds, range of activations,   ``write_grading``
                       order of tokens
``layers.{i}.refit``   codes of the refitted projections                           ``refit_layers``
``lm_head.refit``      codes of the refitted output projection                     ``refit_layers``
``gains``              trained level gains                                         ``train_gains``
=====================  ==========================================================  ========================

Level gains that are not trained are written with the codes. A stage skips the parts that an earlier run has
written.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from checkpoints_tools.source.layer import VALUES_IN_MEMORY
from grinqh_jax.checkpoint import Writer

EMBEDDING, GRADING, GAINS = "embed", "grading", "gains"

STORED_DTYPE = jnp.bfloat16
"""Dtype of embeddings in a checkpoint."""


def write_embedding(weights, writer: Writer) -> None:
    """Writes the embedding of the checkpoint ``weights``, which is read in ranges of tokens."""
    if EMBEDDING in writer.parts:
        return
    key = "embed.embedding"
    tokens, width = weights.parameters[key]
    embedding = np.empty((tokens, width), STORED_DTYPE)
    rows = max(VALUES_IN_MEMORY // width, 1)
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        embedding[start:stop] = weights.read(key, slice(start, stop))
    save(writer, EMBEDDING, {key: embedding})


def refitted(part: str) -> str:
    """Returns the name of the part with the refitted codes of a layer or of the output projection."""
    return f"{part}.refit"


def save(writer: Writer, part: str, leaves: Mapping[str, np.ndarray], **resume_state) -> None:
    """Saves leaves by dotted name in the state tree, unless there are none or the part is complete."""
    if leaves and part not in writer.parts:
        writer.save_part(part, unflatten_dict(leaves, sep="."), **resume_state)
