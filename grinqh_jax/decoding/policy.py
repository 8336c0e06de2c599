"""The policy by which decoding is compiled and scheduled, for each kind of device."""

import dataclasses

from pallas_kernels.lanes import device


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePolicy:
    """Choices that depend on the device and not on the request.

    A policy is static: it is passed to ``jit`` as a static argument, and a different one compiles a
    different program.

    Attributes:
      early_exit: Whether a decode chunk ends once every row is done. Off on a GPU, where the loop condition
        would force a host sync at every step.
      skip_unused_sort: Whether sampling skips the sort of the logits at run time if no row filters by top-k
        or top-p. Off on a GPU, where the branch would force a host sync that costs more than the sort.
      chunk_steps: Number of steps of a decode chunk of a few texts (see ``Device.steps``).
      chunks_ahead: Number of decode chunks in flight while the host processes the one before them.
    """

    early_exit: bool
    skip_unused_sort: bool
    chunk_steps: int
    chunks_ahead: int

    @classmethod
    def for_device(cls) -> "DecodePolicy":
        """Returns the policy for the device that JAX compiles for, and texts that are known in advance.

        That is the device of the abstract mesh in use, otherwise the default device. Call it outside traced
        functions, so that the choice is part of the cache key of ``jit``.
        """
        return GPU if device.target_device().platform in ("gpu", "cuda", "rocm") else CPU

    @classmethod
    def for_engine(cls) -> "DecodePolicy":
        """Returns the policy for the device that JAX compiles for, and requests that come and go."""
        policy = cls.for_device()
        return GPU_ENGINE if policy is GPU else policy


CPU = DecodePolicy(early_exit=True, skip_unused_sort=True, chunk_steps=16, chunks_ahead=0)
"""Short chunks, because the host is the device: text appears sooner, and launching a chunk costs little."""

GPU = DecodePolicy(early_exit=False, skip_unused_sort=False, chunk_steps=32, chunks_ahead=1)
"""Never waits for the host. Launching a chunk takes the host the time of several tokens
(``benchmarks/notes``, entry D18), which must be less than the GPU needs for the previous chunk."""

GPU_ENGINE = dataclasses.replace(GPU, chunk_steps=8)
"""Shorter chunks, because a new request waits for the chunks in flight, and text pauses for a decode chunk
and a prefill chunk. With Qwen3-8B on an H200 at 3 bits, a decode chunk takes 12 ms (one answer) to 17 ms (16
answers, half as many steps), and a prefill chunk of 512 tokens 23 ms (``docs/performance.md``)."""
