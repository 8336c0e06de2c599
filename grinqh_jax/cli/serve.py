"""The verb ``serve``: an HTTP server with OpenAI's protocol."""

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grinqh_jax.cli import command, flags
from grinqh_jax.cli.generation import load_generator, load_speculation, open_model
from grinqh_jax.cli.mesh import add_mesh, make_mesh, on_processes
from grinqh_jax.errors import UsageError

API_KEY = "GRINQH_API_KEY"
"""Environment variable with an API key."""

DEFAULT_CONTEXT = 8192
"""Most tokens of a context by default. The cache has room for this many in every slot."""


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax serve",
        description="Serve a model over HTTP with OpenAI's protocol. SIGTERM and Ctrl-C let running requests "
        f"end. An API key is required if {API_KEY} or --api-key-file has one.",
    )
    flags.add_model(result)
    add_mesh(result)
    add = result.add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, metavar="N", help="port; 0 chooses a free one (default: 8000)")
    add("--served-model-name", metavar="NAME", help="name in requests (default: name of the directory)")
    add(
        "--slots",
        type=flags.positive,
        default=16,
        metavar="N",
        help="number of answers that are decoded at once, 1 to 64; with more than 16, all read weights at "
        "one level, of at least the bits that each asks for (default: 16)",
    )
    add(
        "--max-context",
        type=flags.positive,
        metavar="N",
        help="largest number of tokens in a prompt and its answer together "
        f"(default: the model's limit, but at most {DEFAULT_CONTEXT})",
    )
    add(
        "--cache-memory",
        type=flags.size,
        metavar="SIZE",
        help="memory of the KV cache, such as 8G (default: room for --slots texts of --max-context tokens)",
    )
    add(
        "--no-shared-prefixes",
        action="store_true",
        help="read every prompt as a whole; layers with windows then keep their window in place of the whole "
        "context, which takes less memory",
    )
    add(
        "--prefill-chunk",
        type=flags.positive,
        default=512,
        metavar="N",
        help="prompt tokens read between two decode chunks, a multiple of 64 (default: 512)",
    )
    add(
        "--max-tokens",
        type=flags.positive,
        metavar="N",
        help="largest number of tokens of an answer, and the default of chats (default: the context)",
    )
    add(
        "--prompt-logprobs",
        action="store_true",
        help="let text completions ask for log-probabilities of their prompts (echo with logprobs); compiles "
        "more programs",
    )
    flags.add_speculate(result)
    add(
        "--queue",
        type=flags.non_negative,
        default=256,
        metavar="N",
        help="answers that may wait (default: 256)",
    )
    add(
        "--request-seconds",
        type=_seconds,
        default=600,
        metavar="S",
        help="most seconds from a request to the end of its answers (default: 600)",
    )
    add(
        "--receive-seconds",
        type=_seconds,
        default=20,
        metavar="S",
        help="most seconds in which a client sends its header, and again its body, or takes nothing of a "
        "response (default: 20)",
    )
    add(
        "--drain-seconds",
        type=_seconds,
        default=60,
        metavar="S",
        help="seconds that running requests have after SIGTERM (default: 60)",
    )
    add("--max-body", type=flags.size, default=4 << 20, metavar="SIZE", help="largest body (default: 4M)")
    add(
        "--max-connections",
        type=flags.positive,
        default=1024,
        metavar="N",
        help="number of open connections (default: 1024)",
    )
    add("--api-key-file", metavar="FILE", help="file with API keys, one a line")
    add(
        "--allowed-host",
        type=_host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="name that clients may use for a server without an API key, beside IP addresses, localhost and "
        "the machine's own names; * for any name; may be repeated",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose web pages may use the server, such as https://example.org; may be repeated "
        "(default: none)",
    )
    add("--access-log", action="store_true", help="log every request on stderr")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_serve, parser(), argv)


def _serve(args: argparse.Namespace) -> int:
    try:
        import grinqh_jax.server.run as server  # before the model is loaded
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("grinqh_jax"):
            raise
        raise UsageError(
            f"serve needs the extra serve, and {error.name} is not installed: pip install 'grinqh-jax[serve]'"
        ) from None
    with on_processes(args):
        import jax

        if jax.process_index() > 0:
            return _follow(args)
        return _listen(args, server)


def _listen(args: argparse.Namespace, server) -> int:
    """Serves as the only process, or as the first one."""
    from grinqh_jax.server.access import own_names
    from grinqh_jax.server.limits import Limits
    from grinqh_jax.server.service import Service
    from grinqh_jax.serving.engine import Engine
    from grinqh_jax.serving.processes import Leader, meet

    keys = _keys(args.api_key_file)
    with server.bind(args.host, args.port) as bound:
        leader = None if args.coordinator is None else meet(args.coordinator)
        assert leader is None or isinstance(leader, Leader), "process 0 leads"
        generator, options = _model(args)
        with command.status("compiling"):
            engine = Engine(generator, **options, leader=leader)
        limits = Limits(
            body_bytes=args.max_body,
            receive_seconds=args.receive_seconds,
            request_seconds=args.request_seconds,
            max_tokens=args.max_tokens,
            queue=args.queue,
            connections=args.max_connections,
            drain_seconds=args.drain_seconds,
        )
        if not keys and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
            print(
                f"warning: {server.url(bound)} has no API key; set {API_KEY} or --api-key-file",
                file=sys.stderr,
            )
        with engine:
            service = Service(args.served_model_name or _name(args.model), generator, engine, limits)
            alive = server.serve(
                service,
                bound,
                keys=keys,
                hosts=None if keys else own_names(args.host, args.allowed_host),
                origins=args.cors_origin,
                access_log=args.access_log,
                on_listening=lambda: print(
                    f"{service.name} listens on {server.url(bound)}", file=sys.stderr, flush=True
                ),
            )
    if not alive:
        print(f"error: the engine has ended: {engine.error}", file=sys.stderr)
        return command.FAILURE
    return 0


def _follow(args: argparse.Namespace) -> int:
    """Repeats the calls of process 0 until it ends. It alone reacts to SIGTERM and Ctrl-C."""
    import signal

    from grinqh_jax.decoding.policy import DecodePolicy
    from grinqh_jax.serving.engine_device import engine_device
    from grinqh_jax.serving.processes import Follower, meet
    from grinqh_jax.serving.sizes import PAGE_SIZE

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follower = meet(args.coordinator)
    assert isinstance(follower, Follower), "only process 0 leads"
    generator, options = _model(args)
    speculation, policy = options.pop("speculation"), DecodePolicy.for_engine()
    follower.follow(engine_device(generator, policy, speculation, page_size=PAGE_SIZE, **options))
    return 0


def _model(args: argparse.Namespace):
    """Returns the ``Generator``, and the options of the engine."""
    files = open_model(args.model)
    context = args.max_context or min(files.config.max_position_embeddings, DEFAULT_CONTEXT)
    files.check([None], context)
    generator = load_generator(files, make_mesh(args, files))
    return generator, {
        "slots": args.slots,
        "max_context": context,
        "cache_memory": args.cache_memory,
        "prefill_chunk": args.prefill_chunk,
        "prompt_logprobs": args.prompt_logprobs,
        "share_prefixes": not args.no_shared_prefixes,
        "grammars": True,
        "speculation": load_speculation(args.speculate, generator),
    }


def _name(model: str) -> str:
    """Returns the name of a directory, or a hub id as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _keys(path: str | None) -> list[str]:
    """Returns the API keys of the environment and of a file.

    Raises:
      UsageError: The file cannot be read or has no key, or a key is not printable ASCII.
    """
    keys = [key] if (key := os.environ.get(API_KEY, "").strip()) else []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--api-key-file {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
            ) from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"--api-key-file {path} has no key; write one a line")
        keys += found
    if any(not (key.isascii() and key.isprintable()) or " " in key for key in keys):
        raise UsageError("an API key has a blank or is not printable ASCII; choose another")
    return keys


def _port(text: str) -> int:
    port = flags.non_negative(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 65535")
    return port


def _host_name(text: str) -> str:
    if not text or ":" in text or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name without scheme and port, or *")
    return text


def _seconds(text: str) -> float:
    seconds = flags.number(text)
    if not 0 < seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number of seconds")
    return seconds
