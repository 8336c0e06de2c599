"""The sum over devices on two GPUs, against the sum on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import Activations, decode_rows
from pallas_kernels.exchange import Mailbox

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "features", "steps"), [(1, 4096, 1000), (8, 896, 100), (16, 8192, 100)])
def test_every_exchange_of_a_loop_gives_the_sum(rows, features, steps):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def exchanges(x):
        def step(i, state):
            mailbox, x = state
            references = mailbox.referenced()
            for added in (i % 5, 1.0, -i % 7):
                parts = Activations.sums(jnp.stack([0.25 * x, 0.25 * x]), features)
                x = references.summed(parts).partials[0] + jnp.float32(added)
            return references.frozen(), x

        return jax.lax.fori_loop(0, steps, step, (Mailbox.open(2, rows, features), x[0]))[1][None]

    cut = PartitionSpec("tp")
    program = jax.jit(jax.shard_map(exchanges, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))
    x = np.random.default_rng(0).standard_normal((2, rows, features)).astype(np.float32)
    expected = np.float32(0.5) * x[0] + np.float32(0.5) * x[1]
    for i in range(steps):
        for added in (i % 5, 1, -i % 7):
            expected = expected + np.float32(added)
    for _ in range(3):  # Each run opens another mailbox.
        for result in np.asarray(program(x)):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("rows", "features"), [(1, 4096), (8, 896), (16, 8192)])
def test_an_exchange_with_a_norm_gives_the_bits_of_two_launches(rows, features):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def stepped(fused):
        def step(_, state):
            mailbox, x, normed = state
            box = mailbox.referenced()
            for _ in range(3):
                factor = jnp.float32(1 + jax.lax.axis_index("tp"))
                parts = jnp.stack([normed * factor, normed * 0.5]).astype(jnp.float32)[:, :, None]
                sums = Activations.sums(parts, features).astype(jnp.bfloat16)
                scale = jnp.linspace(0.5, 1.5, features)
                if fused:
                    x, normed = box.add_norm(x, sums, scale, 1e-6)
                else:
                    x, normed = decode_rows.add_norm(x, box.summed(sums), scale, 1e-6)
                normed = normed.array[:, 0]
            return box.frozen(), x, normed

        def program(x):
            state = Mailbox.open(2, rows, features), x, x[:, 0]
            return jax.lax.fori_loop(0, 20, step, state)[1:]

        whole = PartitionSpec()
        on_mesh = jax.shard_map(
            program, mesh=mesh, in_specs=whole, out_specs=PartitionSpec("tp"), check_vma=False
        )
        return jax.jit(on_mesh)

    x = jax.random.normal(jax.random.key(0), (rows, 1, features), jnp.bfloat16)
    for fused, separate in zip(stepped(True)(x), stepped(False)(x), strict=True):
        assert jnp.isfinite(fused).all()
        np.testing.assert_array_equal(np.asarray(fused), np.asarray(separate))
        np.testing.assert_array_equal(np.asarray(fused)[:rows], np.asarray(fused)[rows:])
