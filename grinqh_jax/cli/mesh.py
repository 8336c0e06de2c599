"""The flags of a model on several devices: ``--mesh``, and those of several processes."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from grinqh_jax.cli import command, flags
from grinqh_jax.errors import UsageError


def add_mesh(parser: argparse._ActionsContainer, *, processes: bool = True) -> None:
    """Adds ``--mesh``, and the flags of several processes unless the verb cannot have them."""
    add = parser.add_argument
    add(
        "--mesh",
        metavar="tp=N|auto",
        help="run the model on N devices by tensor parallelism, or on as many as it can be cut among "
        "(default: one device)",
    )
    if not processes:
        return
    add(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="run on several hosts: address of process 0, or auto in a cluster's environment; start the same "
        "command on each",
    )
    add("--processes", type=flags.positive, metavar="N", help="number of processes, with --coordinator")
    add("--process-id", type=flags.non_negative, metavar="I", help="number of this process, from 0")


@contextlib.contextmanager
def on_processes(args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes that ``args`` name, and ends this one if another ends before its time.

    Process 0 alone writes results and figures.

    Raises:
      UsageError: The flags do not fit each other, or the processes do not meet.
    """
    if args.coordinator is None and args.processes is None and args.process_id is None:
        yield
        return
    from grinqh_jax.sharding import processes

    if args.mesh is None:
        raise UsageError("--coordinator needs --mesh tp=N or --mesh auto, because one device has no parts")
    with command.status("waiting for the other processes"):
        processes.join(args.coordinator, args.processes, args.process_id)
    _keep_stdout_for_text()
    if not processes.is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
    try:
        yield
    except BaseException as error:
        _end_all(error)


def _keep_stdout_for_text() -> None:
    """Sends to stderr what libraries print, such as the greetings of XLA's collectives on a CPU (Gloo)."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(stdout, "w", encoding="utf-8", errors="backslashreplace")


def _end_all(error: BaseException) -> None:
    """Reports an error and ends this process at once, so that the others notice and end, too.

    An orderly exit would wait for the others, which wait for this one.
    """
    import jax

    from grinqh_jax.errors import GrinqhError

    name, code = f"process {jax.process_index()}", command.FAILURE
    if isinstance(error, GrinqhError):
        reason, code = str(error), command.USAGE_ERROR
    elif isinstance(error, KeyboardInterrupt):
        reason, code = "interrupted", command.INTERRUPTED
    elif isinstance(error, jax.errors.JaxRuntimeError):
        detail = " ".join(str(error).split())
        reason = f"the devices of another process do not answer; it has ended, or its host ({detail:.200})"
    else:
        import traceback

        traceback.print_exception(error, file=sys.__stderr__)
        reason = "ended by this exception"
    print(f"error: {name}: {reason}; all processes end", file=sys.__stderr__, flush=True)
    os._exit(code)


def make_mesh(args: argparse.Namespace, files):
    """Returns the mesh of ``--mesh`` for a model; None for one device.

    Raises:
      UsageError: The mesh does not fit the devices or the model.
    """
    if args.mesh is None:
        return None
    from grinqh_jax.sharding import mesh

    return mesh.make_mesh(args.mesh, files.config)
