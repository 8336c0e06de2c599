"""The verb ``chat``: a conversation in the terminal.

Each input line is one turn, or a command such as ``/help``; empty lines are ignored. Ctrl-C ends an answer.
Answers go to stdout, everything else to stderr. Earlier turns are not read again (see
``decoding.prompt_cache``).
"""

import argparse
import sys
from collections.abc import Sequence

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.cli import command, flags
from grinqh_jax.cli.conversation import Conversation, run_command
from grinqh_jax.cli.generation import load_generator, load_speculation, open_model
from grinqh_jax.cli.line_reader import LineReader
from grinqh_jax.cli.mesh import add_mesh, make_mesh
from grinqh_jax.errors import GrinqhError, UsageError


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax chat",
        description="Chat with a model in the terminal. The model needs a chat template. Each line is one "
        "turn, or a command: /help lists them. Ctrl-C ends an answer, Ctrl-D the conversation.",
    )
    flags.add_model(result)
    add_mesh(result, processes=False)
    result.add_argument("--stats", action="store_true", help="print the statistics of every answer")
    flags.add_request(result)
    flags.add_speculate(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_chat, parser(), argv)


def _chat(args: argparse.Namespace) -> int:
    request, system = flags.request(args), flags.system_message(args)
    if args.model == str(BUNDLED_MODEL):
        raise UsageError(
            "the bundled qwen3-7m has no chat template and cannot chat: name a chat model (grinqh-jax chat "
            "--model Qwen/Qwen3-0.6B --bits full, or a converted model), or continue a text (grinqh-jax "
            'generate "Once upon a time")'
        )
    files = open_model(args.model)
    if not files.tokenizer.has_chat_template:
        raise UsageError(
            f"{args.model}: the tokenizer has no chat template, so the model cannot chat: name a chat "
            "model, or continue a text with grinqh-jax generate"
        )
    files.check([request.bits], args.max_context)
    generator = load_generator(files, make_mesh(args, files))
    conversation = Conversation(
        generator,
        request,
        system,
        max_context=args.max_context,
        with_statistics=args.stats,
        speculation=load_speculation(args.speculate, generator),
    )
    with LineReader() as reader:
        if reader.is_terminal:
            print(
                f"{files.directory.name}: {conversation.setting()}; /help lists the commands", file=sys.stderr
            )
        while not conversation.ended:
            if reader.is_terminal:
                conversation.compile_ahead()
            try:
                if (line := reader.read()) is None:
                    break
                if line and not run_command(conversation, line):
                    conversation.say(line)
            except GrinqhError as error:  # the conversation goes on
                print(f"error: {error}", file=sys.stderr, flush=True)
    return 0
