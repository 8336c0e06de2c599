"""The decoder as Flax NNX modules: configuration, layers, key-value cache."""
