"""``python -m grinqh_jax.generate``: one prompt, one text.

The text goes to stdout as it is decoded, everything else to stderr. Ctrl-C ends the text; the figures
are still printed and the exit code is 130.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from grinqh_jax import cli
from grinqh_jax.errors import UsageError


def parser() -> cli.Parser:
    """The command's flags."""
    result = cli.Parser(prog="python -m grinqh_jax generate", description="Generate text from a prompt.")
    cli.add_model(result)
    add = result.add_argument
    add("-p", "--prompt", required=True, metavar="TEXT", help="the prompt; - reads standard input as it is")
    add("--json", action="store_true", help="print one JSON object with the text and all figures")
    add_request(result)
    return result


def add_request(result: argparse.ArgumentParser) -> None:
    """Adds the flags of a request, which ``generate`` and ``chat`` share."""
    add = result.add_argument
    add(
        "-m", "--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default 256)"
    )
    add("--bits", type=cli.bits, metavar="B", help="mean bits read per weight, or full (default 4)")
    model = "default: the model's generation_config.json"
    add("--temp", type=float, metavar="T", help=f"temperature, 0 is greedy ({model}, else 0)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help=f"keep the likeliest tokens up to this mass ({model}, else 1)",
    )
    add("--top-k", type=int, metavar="K", help=f"keep the K likeliest tokens, 0 keeps all ({model}, else 0)")
    add(
        "--min-p",
        type=float,
        metavar="P",
        help=f"keep tokens P times as likely as the first ({model}, else 0)",
    )
    add("--seed", type=int, default=0, help="of sampling: the same seed gives the same text (default 0)")
    add("--system-prompt", metavar="TEXT", help="instructions that go before the conversation")
    add("--ignore-chat-template", action="store_true", help="give the prompt to the model as it is")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the text before this; repeatable")
    add("--max-context", type=int, metavar="N", help="most tokens of prompt and text (default: the model's)")


def request(args: argparse.Namespace):
    """The library's request that the flags ask for.

    Raises:
      UsageError: a value is out of its range.
    """
    from grinqh_jax.generator import Request

    return Request(
        bits=args.bits,
        max_tokens=args.max_tokens,
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see ``cli``)."""
    return cli.run(_generate, parser(), argv)


def _generate(args: argparse.Namespace) -> int:
    prompt = cli.read_prompt(args.prompt)
    wanted = request(args)  # flags are checked before the model is loaded
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
        from grinqh_jax.generator import Generator

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
