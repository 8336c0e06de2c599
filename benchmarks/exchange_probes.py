"""Probes of ``two_gpus.py``: an exchange of sums by itself, in a loop on two GPUs.

The probe ``norm`` is an exchange and the norm after it. The other probes are exchanges alone: ``kernel`` uses
``pallas_kernels.exchange``, ``sum`` and ``nccl`` an all-reduce.
"""

import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.sharding import PartitionSpec

from pallas_kernels import Activations, decode_rows
from pallas_kernels.exchange import Mailbox

SIZES = ((1, 4096), (8, 4096), (1, 8192), (8, 8192))
"""Rows and features of the sums of a decode step."""

ADDED = (1, 2, -3) * 5
"""Numbers added after the exchanges of a step of the probe's loop. No two neighbours add up to 0."""

STEPS = 64
"""Steps of the probe's loop."""


def probe(name: str) -> Iterator[dict]:
    """Yields the times of an exchange on two devices, and whether its results are right, for each size."""
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    for rows, features in SIZES:
        for result in (
            probe_norm(mesh, rows, features) if name == "norm" else probe_sum(mesh, name, rows, features)
        ):
            yield {"rows": rows, "features": features, **result}


def probe_sum(mesh, name: str, rows: int, features: int) -> Iterator[dict]:
    """Yields the time of an exchange, and the number of 20 runs whose sums differ from those of the host."""
    x = np.random.default_rng(0).standard_normal((2, rows, features)).astype(np.float32)
    expected = np.float32(0.5) * x[0] + np.float32(0.5) * x[1]
    for added in ADDED * STEPS:
        expected = expected + np.float32(added)
    program = loop_of_exchanges(mesh, name, rows, features)
    results = [np.asarray(program(x)) for _ in range(20)]
    kernels = timing.profile(functools.partial(program, x), 1)
    yield {
        "us": round(1e6 * seconds_of_exchange(program, x), 2),
        # All bits: the order of two numbers does not matter.
        "wrong_runs": sum(not (result == expected).all() for result in results),
        "kernels_us": {kernel[:60]: round(float(np.mean(us)), 2) for kernel, us in kernels.items()},
    }


def probe_norm(mesh, rows: int, features: int) -> Iterator[dict]:
    """Yields the times of exchange and norm in one launch and in two, and whether their bits agree."""
    x = jax.random.normal(jax.random.key(0), (rows, 1, features), jnp.bfloat16)
    results: dict[bool, list] = {}
    for fused in (True, False):
        program = loop_of_norms(mesh, fused, rows, features)
        results[fused] = [np.asarray(result) for result in program(x)]
        kernels = timing.profile(functools.partial(program, x), 1)
        own = {name[:40]: us for name, us in kernels.items() if "norm" in name or "exchange" in name}
        yield {
            "launches": 1 if fused else 2,
            "us": round(1e6 * seconds_of_exchange(program, x), 2),
            "kernels_us": {name: round(float(np.mean(us)), 2) for name, us in own.items()},
        }
    pairs = list(zip(results[True], results[False], strict=True))
    yield {
        "same_bits": all(np.array_equal(one, two) for one, two in pairs),
        "devices_agree": all(np.array_equal(one[:rows], one[rows:]) for one, _ in pairs),
    }


def seconds_of_exchange(program, x) -> float:
    """Returns the time of an exchange of a warm loop, seconds."""
    started = time.perf_counter()
    jax.block_until_ready([program(x) for _ in range(20)])
    return (time.perf_counter() - started) / (20 * STEPS * len(ADDED))


def loop_of_exchanges(mesh, name: str, rows: int, features: int):
    """Returns a jitted function that exchanges ``[2, rows, features]`` again and again.

    After the first exchange each device has the mean of both parts. Each exchange is followed by an addition
    of one of ``ADDED``, so that results differ from those of the exchanges before.
    """

    def step(_, state):
        mailbox, x = state
        box = None if mailbox is None else mailbox.referenced()
        for added in ADDED:
            parts = Activations.sums(jnp.stack([0.25 * x, 0.25 * x]), features)
            parts = parts.summed_across("tp") if box is None else box.summed(parts)
            x = parts.partials[0] + added
        return None if box is None else box.frozen(), x

    def exchanged(x):
        mailbox = Mailbox.open(2, rows, features) if name == "kernel" else None
        return jax.lax.fori_loop(0, STEPS, step, (mailbox, x[0]))[1][None]

    cut = PartitionSpec("tp")
    return jax.jit(jax.shard_map(exchanged, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))


def loop_of_norms(mesh, fused: bool, rows: int, features: int):
    """Returns a jitted function of a bfloat16 residual stream ``[rows, 1, features]``, on all devices.

    A step is ``len(ADDED)`` exchanges of partial sums, each followed by residual addition and norm: in one
    launch if ``fused``, else in two. The results are those of all devices, one after another.
    """

    def step(_, state):
        mailbox, x, normed = state
        box, scale = mailbox.referenced(), jnp.linspace(0.5, 1.5, features)
        for _ in ADDED:
            factor = jnp.float32(1 + jax.lax.axis_index("tp"))
            partials = jnp.stack([factor * normed, 0.5 * normed]).astype(jnp.float32)
            sums = Activations.sums(partials, features).astype(jnp.bfloat16)
            if fused:
                x, norm = box.add_norm(x, sums, scale, 1e-6)
            else:
                x, norm = decode_rows.add_norm(x, box.summed(sums), scale, 1e-6)
            normed = norm.array
        return box.frozen(), x, normed

    def program(x):
        return jax.lax.fori_loop(0, STEPS, step, (Mailbox.open(2, rows, features), x, x))[1:]

    whole, cut = PartitionSpec(), PartitionSpec("tp")
    return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=whole, out_specs=cut, check_vma=False))
