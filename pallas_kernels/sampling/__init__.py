"""Sampling of tokens from the logits of a whole vocabulary, in two launches on an NVIDIA GPU."""

from pallas_kernels.sampling.kernel import SamplingParameters, sample_tokens, supports

__all__ = ["SamplingParameters", "sample_tokens", "supports"]
