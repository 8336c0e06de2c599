"""The engine in a program's own serving loop: prompts in, pieces of text out, all decoded together.

    python examples/serving_loop.py [--model DIR] [--port 8765]
    printf '{"prompt": "The old house", "bits": 2.5, "max_tokens": 20}\n' | nc localhost 8765

Each line of a connection is a request in JSON, with the fields of ``grinqh_jax.Request`` and ``prompt``. The
answer comes as lines ``{"text": ...}``, and a last one with figures or an error. A client that leaves cancels
its answer. The server of ``grinqh-jax serve`` is for the network; this one has no limits.
"""

import argparse
import asyncio
import json

import grinqh_jax
from grinqh_jax.serving.engine import Engine


async def answer(engine: Engine, line: bytes, writer: asyncio.StreamWriter) -> None:
    """Answers one request."""

    async def send(**fields) -> None:
        writer.write(json.dumps(fields).encode() + b"\n")
        await writer.drain()

    running = None
    try:
        fields = json.loads(line)
        prompt = fields.pop("prompt")
        running = engine.submit(prompt, grinqh_jax.Request(**fields))
        async for piece in running:
            await send(text=piece.text)
        figures = running.statistics()
        await send(finish_reason=running.finish_reason, realised_bits=figures.realised_bits)
    except (ValueError, KeyError, TypeError, grinqh_jax.GrinqhError) as error:
        await send(error=str(error))
    finally:
        if running is not None:
            engine.cancel(running)


async def serve(engine: Engine, port: int) -> None:
    """Serves until the program is interrupted."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for line in reader:
                await answer(engine, line, writer)
        except ConnectionError:
            pass  # The client has left.
        finally:
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", port)
    print(f"listens on port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=grinqh_jax.BUNDLED_MODEL, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--port", type=int, default=8765, help="0 for a free one (default: %(default)s)")
    parser.add_argument("--max-context", type=int, default=512)
    args = parser.parse_args()
    generator = grinqh_jax.Generator.load(args.model)
    with Engine(generator, slots=4, max_context=args.max_context, prefill_chunk=64) as engine:
        asyncio.run(serve(engine, args.port))


if __name__ == "__main__":
    main()
