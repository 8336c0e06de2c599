"""Several processes, on one host or on many, that run one model together (``jax.distributed``).

Every process runs the same program on the same arguments, and each has some of the devices of the mesh. All
of them compute every token, and process 0 writes it.
"""

import jax

from grinqh_jax.errors import UsageError

AUTO = "auto"
"""Coordinator that is found in the environment of a cluster."""

START_SECONDS = 120
"""Time that the processes have to find each other."""

HEARTBEAT_SECONDS = 20
"""Time without a sign of life after which a process counts as dead, and all others end."""


def join(coordinator: str | None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes. Call it before anything else uses JAX's devices.

    Args:
      coordinator: ``HOST:PORT`` of process 0, the same for all; ``auto`` to read it, and the other two
        numbers, from the environment of Slurm, Open MPI or another cluster that ``jax.distributed`` knows;
        None for a single process.
      processes: Number of processes.
      process: Number of this process, from 0.

    Raises:
      UsageError: The arguments do not fit each other, or the processes do not find each other.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise UsageError("--processes and --process-id need --coordinator HOST:PORT, that of process 0")
        return
    numbers = processes, process
    if coordinator == AUTO and numbers != (None, None):
        raise UsageError("--coordinator auto reads the processes from the environment; leave out the others")
    if coordinator != AUTO and (processes is None or process is None or not 0 <= process < processes):
        raise UsageError(
            f"--coordinator {coordinator} needs --processes N and --process-id I, from 0 to N - 1; got "
            f"{processes} and {process}"
        )
    try:
        jax.distributed.initialize(
            None if coordinator == AUTO else coordinator,
            processes,
            process,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--coordinator {coordinator}: the processes do not meet: {reason:.200}") from None


def is_first() -> bool:
    """Whether this process writes the results."""
    return jax.process_index() == 0
