"""Compares the engine with ``Generator`` on a CPU: speed, equal answers, and what a grammar costs.

    python benchmarks/engine_cpu.py --output benchmarks/results/engine-cpu.json

``answers`` are greedy answers to the same prompts, one after another by ``Generator`` and together by engines
with some numbers of slots; ``different`` counts the answers that are not those of ``Generator``. ``grammar``
decodes one answer in each slot, once without a grammar and once with a JSON schema for one of them. The
tokens of a second of processor time count those of all answers. The second run of each kind is timed.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import report as reports
from report import say

from grinqh_jax import BUNDLED_MODEL, Generator, Request
from grinqh_jax.serving.engine import Engine

SUBJECTS = "books", "apples", "stamps", "tables"
NUMBERS = (3, 5), (12, 30), (48, 36), (7, 19)
CONTEXT = 256
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}, "sum": {"type": "integer"}}}


def prompts() -> list[str]:
    """Returns 16 word problems."""
    return [
        f"Question: Anna has {first} {subject} and buys {second} more. How many {subject} is that?\nAnswer:"
        for subject in SUBJECTS
        for first, second in NUMBERS
    ]


Texts = list[tuple[str, int]]
"""Answers and their numbers of tokens."""


def one_by_one(generator: Generator, request: Request) -> Texts:
    """Generates the answers to all prompts, one after another."""
    texts = []
    for prompt in prompts():
        generation = generator.generate(prompt, request)
        texts.append(("".join(generation), generation.statistics().generated_tokens))
    return texts


def together(engine: Engine, request: Request, count: int, schema: bool = False) -> Texts:
    """Generates the answers to ``count`` prompts, the first one with the schema if ``schema``."""
    grammars = [engine.grammar(SCHEMA) if schema and i == 0 else None for i in range(count)]
    pairs = zip(prompts(), grammars, strict=False)
    answers = [engine.submit(prompt, request, grammar=grammar) for prompt, grammar in pairs]
    return [(answer.result(), answer.statistics().generated_tokens) for answer in answers]


def timed(run: Callable[[], Texts]) -> tuple[Texts, dict[str, Any]]:
    """Returns the texts of the second call, and the number of its tokens, also in a second."""
    run()
    start, processors = time.perf_counter(), time.process_time()
    texts = run()
    seconds, processors = time.perf_counter() - start, time.process_time() - processors
    tokens = sum(count for _, count in texts)
    return texts, {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_processor_second": round(tokens / processors, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(BUNDLED_MODEL), metavar="DIR", help="default: the bundled model")
    add("--bits", type=float, default=3.0, metavar="B", help="default: 3")
    add("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    add("--slots", type=int, nargs="+", default=[1, 8], metavar="N", help="of the engines (default: 1 8)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    machine = {"processors": os.cpu_count(), "python": platform.python_version()}
    report = reports.Report(args, machine=machine, answers=[], grammar=[])
    generator = Generator.load(args.model)
    request = Request(bits=args.bits, max_tokens=args.tokens, temperature=0)
    alone, figures = timed(functools.partial(one_by_one, generator, request))
    report.fields["answers"].append({"by": "Generator"} | figures)
    say(str(report.fields["answers"][-1]))
    for slots in args.slots:
        with Engine(generator, slots=slots, max_context=CONTEXT, grammars=True) as engine:
            texts, figures = timed(functools.partial(together, engine, request, len(prompts())))
            different = sum(one != other for one, other in zip(texts, alone, strict=True))
            report.fields["answers"].append(
                {"by": "Engine", "slots": slots, "different": different} | figures
            )
            say(str(report.fields["answers"][-1]))
            for schema in (False, True):
                _, figures = timed(functools.partial(together, engine, request, slots, schema))
                report.fields["grammar"].append({"slots": slots, "schema": schema} | figures)
                say(str(report.fields["grammar"][-1]))
            report.save()
    report.finish()


if __name__ == "__main__":
    main()
