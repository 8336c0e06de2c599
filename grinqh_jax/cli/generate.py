"""The verb ``generate``: continues a prompt.

The text streams to stdout; everything else goes to stderr. Ctrl-C ends the text. The statistics are still
printed, and the exit code is 130.
"""

import argparse
from collections.abc import Sequence

from grinqh_jax.cli import command, flags, text_input
from grinqh_jax.cli.generation import (
    compiling,
    load_generator,
    load_speculation,
    open_model,
    print_statistics,
)
from grinqh_jax.cli.mesh import add_mesh, make_mesh, on_processes
from grinqh_jax.decoding.request import Request
from grinqh_jax.errors import UsageError
from grinqh_jax.json_files import json_line


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax generate",
        description="Generate text from a prompt. The text streams to stdout, the statistics go to stderr. "
        "If the model has a chat template, the prompt becomes the user's message.",
    )
    flags.add_model(result)
    add_mesh(result)
    add = result.add_argument
    add("text", nargs="?", metavar="PROMPT", help="prompt (default: standard input, unless a terminal)")
    add("-p", "--prompt", metavar="TEXT", help="the prompt as a flag; - reads it from standard input")
    add("--json", action="store_true", help="print one JSON object with the text and all statistics")
    flags.add_request(result)
    flags.add_speculate(result)
    add(
        "--ignore-chat-template",
        action="store_true",
        help="pass the prompt to the model without the chat template",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_generate, parser(), argv)


def _generate(args: argparse.Namespace) -> int:
    request, system = flags.request(args), flags.system_message(args)
    prompt = text_input.read_prompt(args.prompt, args.text)
    with on_processes(args):
        return _write(args, prompt, request, system)


def _write(args: argparse.Namespace, prompt: str, request: Request, system: list[dict[str, str]]) -> int:
    files = open_model(args.model)
    prompt_tokens = _prompt_tokens(files, prompt, system, args)
    files.check([request.bits], args.max_context, len(prompt_tokens))  # before the weights are loaded
    generator = load_generator(files, make_mesh(args, files))
    speculation = load_speculation(args.speculate, generator)
    with compiling():
        generation = generator.generate(
            prompt_tokens, request, max_context=args.max_context, speculation=speculation
        )
    interrupted = False
    try:
        with compiling():
            generation.prepare()
        for text in generation:
            if not args.json:
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    statistics = generation.statistics()
    if args.json:
        result = {
            "text": generation.text,
            "finish_reason": "interrupted" if interrupted else generation.finish_reason,
            "model": args.model,
            "bits": generation.bits,
            "seed": args.seed,
        }
        print(json_line(result | statistics.to_json()))
    else:
        print(flush=True)
    print_statistics(statistics, interrupted)
    return command.INTERRUPTED if interrupted else 0


def _prompt_tokens(files, prompt: str, system: list[dict[str, str]], args: argparse.Namespace) -> list[int]:
    """Returns the tokens of the prompt, as a user's message if the model has a chat template."""
    templated = files.tokenizer.has_chat_template and not args.ignore_chat_template
    if system and not templated:
        reason = "it excludes --ignore-chat-template" if args.ignore_chat_template else "the model has none"
        raise UsageError(f"--system-prompt needs a chat template: {reason}")
    if not templated:
        return files.tokenizer.encode(prompt)
    return files.tokenizer.chat([*system, {"role": "user", "content": prompt}])
