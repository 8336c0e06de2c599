"""The decoder as Flax NNX modules: configuration, structure, layers, KV cache."""
