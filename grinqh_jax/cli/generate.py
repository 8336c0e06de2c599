"""``python -m grinqh_jax.generate``: one prompt, one text.

The text goes to stdout as it is decoded, everything else to stderr. Ctrl-C ends the text; the figures
are still printed and the exit code is 130.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from grinqh_jax.cli import command as cli
from grinqh_jax.cli import flags, text_input
from grinqh_jax.errors import UsageError


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(prog="python -m grinqh_jax generate", description="Generate text from a prompt.")
    flags.add_model(result)
    add = result.add_argument
    add("-p", "--prompt", required=True, metavar="TEXT", help="the prompt; - reads standard input as it is")
    add("--json", action="store_true", help="print one JSON object with the text and all figures")
    flags.add_request(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_generate, parser(), argv)


def _generate(args: argparse.Namespace) -> int:
    prompt = text_input.read_prompt(args.prompt)
    wanted = flags.request(args)  # flags are checked before the model is loaded
    generator = load(args.model)
    generation = generator.generate(_tokens(generator, prompt, args), wanted, max_context=args.max_context)
    interrupted = False
    try:
        with cli.status("compiling"):
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
        print(json.dumps(result | statistics.to_json(), ensure_ascii=False))
    else:
        print(flush=True)
    report(statistics, interrupted)
    return cli.INTERRUPTED if interrupted else 0


def load(model: str):
    """The generator of a ``--model``."""
    with cli.status(f"loading {model}"):
        from grinqh_jax.decoding.generator import Generator

        return Generator.load(model)


def report(statistics, interrupted: bool = False) -> None:
    """Prints the figures of a generation on stderr."""
    if interrupted:
        print("interrupted", file=sys.stderr)
    for line in statistics.lines():
        print(line, file=sys.stderr)
    if warning := statistics.warning():
        print(f"warning: {warning}", file=sys.stderr)


def _tokens(generator, prompt: str, args: argparse.Namespace) -> str | list[int]:
    """The prompt as the chat template wants it, or as it is where there is none."""
    templated = generator.tokenizer.has_chat_template and not args.ignore_chat_template
    if args.system_prompt is not None and not templated:
        reason = "it excludes --ignore-chat-template" if args.ignore_chat_template else "the model has none"
        raise UsageError(f"--system-prompt needs a chat template: {reason}")
    if not templated:
        return prompt
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    return generator.tokenizer.chat([*system, {"role": "user", "content": prompt}])


if __name__ == "__main__":
    sys.exit(main())
