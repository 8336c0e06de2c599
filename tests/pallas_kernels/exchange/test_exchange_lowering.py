"""The sum over devices, lowered and assembled for absent GPUs."""

import collections
import re

import cuda_source
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import Activations
from pallas_kernels.decode_rows.program import AddNormRefs, Shape
from pallas_kernels.exchange import Mailbox
from pallas_kernels.exchange.program import (
    ExchangeRefs,
    Layout,
    exchange_add_norm_program,
    exchange_program,
)
from pallas_kernels.lanes import device
from pallas_kernels.lanes.rows import Rows

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2"
)
FEATURES = 4096


def sums(parts, step_count):
    """Returns a sum over devices of a sum over devices, in each step of a loop."""
    mailbox = Mailbox.open(2, 1, FEATURES)

    def step(_, state):
        mailbox, x = state
        references = mailbox.referenced()
        for _ in range(2):
            x = references.summed(Activations.sums(jnp.stack([x, x]), FEATURES)).partials[0]
        return references.frozen(), x

    return jax.lax.fori_loop(0, step_count, step, (mailbox, parts))[1]


def norms(parts, step_count):
    """Returns a residual stream to which sums over devices are added, each with its norm, in a loop."""
    mailbox, stream = Mailbox.open(2, 1, FEATURES), parts[:, None].astype(jnp.bfloat16)

    def step(_, state):
        mailbox, x, normed = state
        references = mailbox.referenced()
        for _ in range(2):
            sums = Activations.sums(jnp.stack([normed, normed]).astype(jnp.float32), FEATURES)
            sums = sums.astype(jnp.bfloat16)
            x, norm = references.add_norm(x, sums, jnp.ones(FEATURES), 1e-6)
            normed = norm.array
        return references.frozen(), x, normed

    return jax.lax.fori_loop(0, step_count, step, (mailbox, stream, stream))[1]


@pytest.mark.parametrize("program", [sums, norms])
def test_the_devices_exchange_through_one_mailbox_that_is_never_copied(program):
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("tp",), (AxisType.Auto,), abstract_device=gpu)
    whole, cut = PartitionSpec(), PartitionSpec("tp")
    on_mesh = jax.shard_map(
        lambda parts: program(parts, 5), mesh=mesh, in_specs=cut, out_specs=whole, check_vma=False
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(on_mesh).trace(jax.ShapeDtypeStruct((2, FEATURES), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    # Only opening needs the addresses of other devices, which the runtime exchanges, and its barrier.
    of_peers = [bool(re.search(r"uses_xla_collective_metadata = true", line)) for line in calls]
    assert collections.Counter(of_peers) == {True: 1, False: 2}
    assert all("skip_device_barrier = false" in line for line in calls if "metadata = true" in line)
    words = f"tensor<{Layout(2, Rows(1, FEATURES)).words}xi32>"
    assert all("output_operand_alias" in line and words in line for line in calls)


@pytest.mark.slow
@pytest.mark.skipif(cuda_source.NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_the_program_assembles(monkeypatch, tmp_path, architecture):
    rows = Rows(8, FEATURES)

    def program(isa, refs):
        exchange_program(isa, Layout(8, rows), Shape(rows, 8, FEATURES), ExchangeRefs(*refs[:3]))

    names = ["partials", "mailbox", "total", None]
    cuda_source.assemble(monkeypatch, tmp_path, program, names, rows.threads, architecture)


@pytest.mark.slow
@pytest.mark.skipif(cuda_source.NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_the_program_with_a_norm_assembles(monkeypatch, tmp_path, architecture):
    rows = Rows(16, 8192)

    def program(isa, refs):
        mailbox, *arrays = refs
        shape = Shape(rows, 8, rows.features)
        exchange_add_norm_program(isa, Layout(8, rows), shape, AddNormRefs(*arrays), mailbox)

    names = ["mailbox", "x", "partials", "norm_scale", "total", "values", "square_partials", None]
    cuda_source.assemble(monkeypatch, tmp_path, program, names, rows.threads, architecture)
