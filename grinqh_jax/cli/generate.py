"""The verb ``generate``: continues a prompt.

The text streams to stdout; everything else goes to stderr. Ctrl-C ends the text. The statistics are still
printed, and the exit code is 130.
"""

import argparse
from collections.abc import Sequence

from grinqh_jax.cli import command, flags, text_input
from grinqh_jax.cli.generation import load_generator, print_statistics
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
    add = result.add_argument
    add("-p", "--prompt", required=True, metavar="TEXT", help="prompt; - reads it from standard input")
    add("--json", action="store_true", help="print one JSON object with the text and all statistics")
    flags.add_request(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_generate, parser(), argv)


def _generate(args: argparse.Namespace) -> int:
    prompt = text_input.read_prompt(args.prompt)
    request = flags.request(args)  # flags are checked before the model is loaded
    generator = load_generator(args.model)
    prompt_tokens = _apply_chat_template(generator, prompt, args)
    generation = generator.generate(prompt_tokens, request, max_context=args.max_context)
    interrupted = False
    try:
        with command.status("compiling"):
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


def _apply_chat_template(generator, prompt: str, args: argparse.Namespace) -> str | list[int]:
    """Returns the tokens of the templated prompt, or the prompt itself if no template applies."""
    templated = generator.tokenizer.has_chat_template and not args.ignore_chat_template
    if args.system_prompt is not None and not templated:
        reason = "it excludes --ignore-chat-template" if args.ignore_chat_template else "the model has none"
        raise UsageError(f"--system-prompt needs a chat template: {reason}")
    if not templated:
        return prompt
    return generator.tokenizer.chat([*flags.system_message(args), {"role": "user", "content": prompt}])
