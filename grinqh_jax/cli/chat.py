"""``python -m grinqh_jax chat``: a conversation in the terminal.

Each line read is one turn; an empty line is ignored. Ctrl-C ends an answer, Ctrl-D (or Ctrl-C at the
prompt) the conversation. Answers go to stdout, everything else to stderr.
"""

import argparse
import sys
from collections.abc import Sequence

from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags, text_input
from grinqh_jax.cli.generate import load, report
from grinqh_jax.errors import UsageError


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(
        prog="python -m grinqh_jax chat", description="Talk to a model that has a chat template."
    )
    flags.add_model(result)
    flags.add_request(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_chat, parser(), argv)


def _chat(args: argparse.Namespace) -> int:
    wanted = flags.request(args)
    generator = load(args.model)
    if args.ignore_chat_template:
        raise UsageError("chat needs the chat template; leave out --ignore-chat-template, or use generate")
    if not generator.tokenizer.has_chat_template:
        raise UsageError(f"{args.model}: the tokenizer has no chat template; use generate, or a chat model")
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    messages = list(system)
    while (line := _read_line()) is not None:
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        tokens = generator.tokenizer.chat(messages)
        generation = generator.generate(tokens, wanted, max_context=args.max_context)
        interrupted = False
        try:
            with cli.status("compiling"):
                generation.prepare()
            for text in generation:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(flush=True)
        report(generation.statistics(), interrupted)
        messages.append({"role": "assistant", "content": generation.text})
    return 0


def _read_line() -> str | None:
    """The next line of the user's; None at the end of the conversation."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.buffer.readline()
    except KeyboardInterrupt:
        return None
    return text_input.decode(line, "standard input").strip() if line else None
