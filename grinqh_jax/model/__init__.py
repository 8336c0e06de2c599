"""The decoder as Flax NNX modules: configuration, structure, layers, output projection, KV cache."""
