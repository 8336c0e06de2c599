"""Tensor parallelism: one model on several devices, with JAX's mesh and ``shard_map``."""
