"""Sweeps the quality of quantization methods and settings against the bits they read."""
