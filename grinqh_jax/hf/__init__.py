"""Reads Hugging Face checkpoints (config.json and safetensors) tensor by tensor."""

from grinqh_jax.hf.load import load_decoder
from grinqh_jax.hf.reader import HFCheckpoint, open_checkpoint, resolve

__all__ = ["HFCheckpoint", "load_decoder", "open_checkpoint", "resolve"]
