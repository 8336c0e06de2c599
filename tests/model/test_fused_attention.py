"""When cuDNN attends. ``test_fused_attention_gpu.py`` compares what it computes."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from grinqh_jax.model import attention, fused_attention
from grinqh_jax.model.cache import KeyValues
from grinqh_jax.model.ring_cache import RingKeyValues, ring_slots

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
    ],
)
def test_what_cudnn_does_not_compute_is_named(case, options, reason):
    assert fused_attention.lacks(case, **options) == reason


def test_sinks_need_channels(monkeypatch):
    device = mock.Mock(spec=jax.Device, compute_capability="9.0")
    monkeypatch.setattr(fused_attention, "target_device", lambda: device)
    monkeypatch.setattr(fused_attention, "unsupported_reason", lambda: None)
    assert fused_attention.lacks(queries(head_dim=64), sinks=jnp.zeros(8)) is None
    assert fused_attention.lacks(queries(head_dim=256), sinks=jnp.zeros(8)) == "heads of 264"


@pytest.fixture
def by_xla(monkeypatch):
    """XLA computes what cuDNN does on a GPU."""
    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **o: attend(*a, **o))


def random_heads(tokens: int, slots: int):
    """Queries, keys and values of two rows, and a sink of each head."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, tokens, 8, 64), (2, slots, 2, 64), (2, slots, 2, 64)
    heads = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys[:3], shapes, strict=True)]
    return heads, 3 * jax.random.normal(keys[3], (8,), jnp.float32)


@pytest.mark.usefixtures("by_xla")
def test_a_slot_whose_score_is_the_sink_is_a_sink():
    """The reference is the softmax with sinks, in float32."""
    heads, sinks = random_heads(33, 61)
    visible = jnp.broadcast_to(jnp.arange(33)[:, None] + 20 >= jnp.arange(61), (2, 1, 33, 61))
    outputs = jax.jit(fused_attention.attend)(*heads, visible, sinks).astype(jnp.float32)
    expected = attention._attend_masked(*(x.astype(jnp.float32) for x in heads), visible, None, sinks)
    assert outputs.shape == expected.shape
    assert jnp.linalg.norm(outputs - expected) < 4e-3 * jnp.linalg.norm(expected)


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("sinks", [False, True])
def test_slots_behind_the_lengths_are_not_computed(sinks):
    """The rows have 40 and 61 tokens of a cache of 80 slots. The mask alone lets the first row see more."""
    (queries, keys, values), sink = random_heads(17, 80)
    options = sink if sinks else None, jnp.array([40, 61])
    everything = jnp.ones((2, 1, 17, 80), bool)
    outputs = jax.jit(fused_attention.attend)(queries, keys, values, everything, *options)
    for row, length in enumerate([40, 61]):
        one = [x[row : row + 1] for x in (queries, keys[:, :length], values[:, :length])]
        alone = fused_attention.attend(*one, everything[:1, ..., :length], options[0])
        assert jnp.linalg.norm(outputs[row] - alone[0]) < 4e-3 * jnp.linalg.norm(alone)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.bfloat16, 1e-7), (jnp.float16, 1e-5)])
def test_the_score_of_the_slot_is_the_sink_in_float32(dtype, error):
    sinks = jax.random.normal(jax.random.key(1), (8,), jnp.float32)
    zeros = jnp.zeros((1, 1, 8, 64), dtype), *[jnp.zeros((1, 8, 2, 64), dtype)] * 2
    make = jax.jit(fused_attention.with_sink_slot)
    q, k, _, visible = make(*zeros, jnp.zeros((1, 1, 1, 8), bool), sinks)
    scores = jnp.einsum("hd,sd->hs", q[0, 0].astype(jnp.float32), k[0, :, 0].astype(jnp.float32)) / 8
    assert jnp.allclose(scores[:, 0], sinks, rtol=1e-6, atol=error)
    assert not scores.at[:, 0].set(0).any()
    assert visible[0, 0, 0].tolist() == [slot == 0 for slot in range(16)]


@pytest.mark.parametrize("ring", [False, True])
def test_cudnn_gets_the_length_of_each_text(monkeypatch, ring):
    """The slots of a ring are in no order of their positions, so it has no length."""
    got = []

    def attend(queries, keys, values, visible, sinks, lengths):
        got.append(lengths)
        return queries

    monkeypatch.setattr(fused_attention, "lacks", lambda *_: None)
    monkeypatch.setattr(fused_attention, "attend", attend)
    (queries, keys, values), _ = random_heads(33, 33)
    positions = jnp.array([[7], [20]]) + jnp.arange(33)
    cache = RingKeyValues.zeros(2, ring_slots(40), 2, 64, jnp.bfloat16)
    if not ring:
        cache = KeyValues(*[jnp.zeros((2, 80, 2, 64), jnp.bfloat16)] * 2)
    attention.attend(queries, keys, values, positions, cache, 40 if ring else None)
    (lengths,) = got
    assert lengths is None if ring else lengths.tolist() == [40, 53]
