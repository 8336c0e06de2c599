"""The decode policy follows the device that JAX compiles for."""

import dataclasses

import jax
from jax.sharding import AxisType

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.policy import DecodePolicy


def test_the_policy_follows_the_device_in_use():
    assert jax.default_backend() == "cpu"
    assert DecodePolicy.for_device() is DecodePolicy.for_engine() is policy.CPU
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        assert DecodePolicy.for_device() is policy.GPU
        assert DecodePolicy.for_engine() is policy.GPU_ENGINE


def test_policies_are_equal_by_value():
    """Equal policies share a compiled program."""
    same = dataclasses.replace(policy.GPU, chunk_steps=policy.GPU.chunk_steps)
    assert same == policy.GPU
    assert hash(same) == hash(policy.GPU)
