"""The verb ``chat``: a conversation in the terminal.

Each input line is one turn; empty lines are ignored. Ctrl-C ends an answer. Ctrl-D, or Ctrl-C at the prompt,
ends the conversation. Answers go to stdout, everything else to stderr. Earlier turns are not read again
(see ``decoding.prompt_cache``).
"""

import argparse
import sys
from collections.abc import Sequence

from grinqh_jax.cli import command, flags, text_input
from grinqh_jax.cli.generation import load_generator, print_statistics
from grinqh_jax.errors import UsageError
from grinqh_jax.text.unicode import decode


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax chat",
        description="Chat with a model in the terminal. The model needs a chat template. Each line is one "
        "turn; Ctrl-C ends an answer, Ctrl-D ends the conversation.",
    )
    flags.add_model(result)
    flags.add_request(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_chat, parser(), argv)


def _chat(args: argparse.Namespace) -> int:
    request = flags.request(args)
    generator = load_generator(args.model)
    from grinqh_jax.decoding.prompt_cache import PromptCache

    if args.ignore_chat_template:
        raise UsageError("chat needs the chat template; leave out --ignore-chat-template, or use generate")
    if not generator.tokenizer.has_chat_template:
        raise UsageError(f"{args.model}: the tokenizer has no chat template; use generate, or a chat model")
    system = flags.system_message(args)
    messages, prompt_cache = list(system), PromptCache()
    while (line := _read_line()) is not None:
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        tokens = generator.tokenizer.chat(messages)
        generation = generator.generate(
            tokens, request, max_context=args.max_context, prompt_cache=prompt_cache
        )
        interrupted = False
        try:
            with command.status("compiling"):
                generation.prepare()
            for text in generation:
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(flush=True)
        print_statistics(generation.statistics(), interrupted)
        messages.append({"role": "assistant", "content": generation.text})
    return 0


def _read_line() -> str | None:
    """Returns the user's next line, or None at the end of the conversation."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.buffer.readline()
    except KeyboardInterrupt:
        return None
    return decode(line, text_input.STANDARD_INPUT).strip() if line else None
