"""When cuDNN attends. ``test_fused_attention_gpu.py`` compares what it computes."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from grinqh_jax.model import fused_attention

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def queries(tokens=64, head_dim=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, tokens, 8, head_dim), dtype)


def test_a_cpu_has_no_cudnn():
    """Before jax 0.11.2 no GPU has this path, as it has no kernels."""
    assert fused_attention.lacks(queries()).startswith(("needs an NVIDIA GPU", "needs jax >= 0.11.2"))


def test_a_gpu_that_is_not_there_is_not_asked_for_its_capability():
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh):
        assert fused_attention.lacks(queries()) == "a mesh or a device that is not there"


@pytest.mark.parametrize(
    ("capability", "head_dim", "reason"),
    [
        ("8.9", 128, None),
        ("8.9", 136, "heads of 136"),
        ("9.0", 256, None),
        ("9.0", 264, "heads of 264"),
        ("9.0", 100, "heads of 100"),
        ("10.0", 256, None),
    ],
)
def test_the_largest_head_depends_on_the_capability(monkeypatch, capability, head_dim, reason):
    device = mock.Mock(spec=jax.Device, compute_capability=capability)
    monkeypatch.setattr(fused_attention, "target_device", lambda: device)
    monkeypatch.setattr(fused_attention, "unsupported_reason", lambda: None)
    assert fused_attention.lacks(queries(head_dim=head_dim)) == reason


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (queries(tokens=16), {}, "decode steps"),
        (queries(dtype=jnp.float32), {}, "float32"),
        (queries(), {"soft_cap": 30.0}, "a soft cap of the scores"),
        (queries(), {"sinks": jnp.zeros(8)}, "sinks"),
    ],
)
def test_what_cudnn_does_not_compute_is_named(case, options, reason):
    assert fused_attention.lacks(case, **options) == reason
