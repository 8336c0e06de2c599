"""Checkpoints as safetensors files, for programs without Orbax, and back."""
