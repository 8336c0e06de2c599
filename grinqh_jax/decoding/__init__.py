"""Decoding: prefill and decode steps, the dial, sampling, and the library's ``Generator``."""
