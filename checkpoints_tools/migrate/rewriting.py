"""Writes a checkpoint of an older format version in the present one."""

import dataclasses
import itertools
from pathlib import Path

from flax.traverse_util import unflatten_dict

from checkpoints_tools.convert.sizes import bits_per_weight_stored
from checkpoints_tools.publish.origin import CARD
from grinqh_jax.checkpoint import QuantizationConfig, Writer, load
from grinqh_jax.checkpoint.checksums import file_checksum
from grinqh_jax.checkpoint.manifest import MANIFEST
from grinqh_jax.checkpoint.quantization import VERSION
from grinqh_jax.checkpoint.reader import read_description
from grinqh_jax.companions import find_companions
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.decoder import checkpoint_leaves

STORED_BITS = "bits_per_weight_stored"
"""Key of the provenance that the layout of the weights changes."""


def migrate(model: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Writes a checkpoint in the present version of the format. Memory holds the whole model.

    Args:
      model: GRINQH checkpoint of any version.
      out: Directory to make.
      overwrite: See ``Writer``.

    Returns:
      The absolute path of ``out``.

    Raises:
      CheckpointError: See ``load`` and ``Writer``.
    """
    hf_config, quantization = read_description(model)
    loaded = load(model)
    card = (model / CARD).read_bytes() if (model / CARD).is_file() else None
    leaves = sorted(checkpoint_leaves(loaded.model).items())
    fingerprint = f"migrate {file_checksum(model / MANIFEST)}"
    with Writer(out, fingerprint=fingerprint, overwrite=overwrite) as writer:
        for layer, group in itertools.groupby(leaves, lambda leaf: ".".join(leaf[0].split(".")[:2])):
            if layer not in writer.parts:
                writer.save_part(layer, unflatten_dict(dict(group), sep="."))
        written = writer.finalize(
            hf_config, _measured_again(quantization, loaded.config), find_companions(model)
        )
    if card is not None:
        text = card.decode().replace("checkpoint version 1", f"checkpoint version {VERSION}")
        (written / CARD).write_text(text)
    return written


def _measured_again(quantization: QuantizationConfig, config: ModelConfig) -> QuantizationConfig:
    """Returns the quantization with the stored bits of the present version in its provenance."""
    provenance = dict(quantization.provenance)
    if STORED_BITS in provenance:
        provenance[STORED_BITS] = round(bits_per_weight_stored(config, quantization.max_bits), 4)
    return dataclasses.replace(quantization, provenance=provenance)
