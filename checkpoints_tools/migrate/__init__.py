"""Checkpoints of older format versions, written in the present one."""
