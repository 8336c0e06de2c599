"""Times decode steps that verify drafts, and replays fixed texts through prompt lookup.

    python benchmarks/speculation.py --output benchmarks/results/speculation.json        both, on a GPU
    python benchmarks/speculation.py --shapes --model qwen3-8b-grinqh                    only the replay
    python benchmarks/speculation.py --shapes Qwen3-0.6B --layers 2 --contexts 128       a quick check

The times are those of whole steps with random weights, drafting included: of plain decoding, and of each
number of drafts, where all texts have drafts and where none has. The tokens per step of the replay
(``speculation_replay``) and these times give the speed over plain decoding: with each number of drafts, and
with the drafts that the decode loop chooses for one text. The first measurements run while the last programs
compile, so all are repeated in the end. The JSON file is written after each.

``self`` drafts with the model itself at 2 bits. Its acceptance needs a trained model, so only its time is
measured.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import platform
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import report as reports
import speculation_replay
from report import say
from speculation_replay import Replay
from speculation_steps import LOOKUP, OFF, SELF, Steps

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.slots.step_shapes import StepShape, step_shapes
from grinqh_jax.decoding.speculation.speculation import MOST_DRAFTS

CHUNK_STEPS = 32
"""Steps of a chunk without drafts in ``generate`` on a GPU, for the replay on any device."""


def timed_steps(config, label: str, args, report: reports.Report, save: Callable[[], None]) -> None:
    """Records the times of steps by bits, number of texts, drafts and context."""
    steps = Steps(config, label, args, report)
    say(f"{label}: made weights")
    for case, program in reports.called_in_order(steps.lowered()):
        steps.compiled(case, program)
        for _ in steps.measure(case, args.bits[0]):
            save()
    say(f"{label}: compiled all programs")
    for bits in args.bits:
        for case in steps.cases():
            for _ in steps.measure(case, bits):
                save()
        if bits != args.bits[0]:
            continue
        for case in [case for case in steps.cases() if case.texts == args.batch[0]][: args.profile]:
            if not report.out_of_time(f"profile of {case}"):
                report.fields["profiles"][str(case)] = steps.profile(case, bits)
                save()


def step_times(rows: list[dict]) -> dict[tuple, dict]:
    """Returns times of lookup's steps by bits, context, texts and drafts: ``off``, ``none`` and ``all``.

    These are the times of plain decoding, and of steps where no text and all texts verify drafts.
    """
    plain, of_cases = {}, {}
    for row in rows:
        case = row["bits"], row["context"], row["texts"]
        if row["drafter"] == OFF:
            plain[case] = row["us_per_step"]
        if row["drafter"] == LOOKUP:
            of_case = of_cases.setdefault((*case, row["drafts"]), {})
            if row["verified"] == row["drafts"]:
                of_case["all"] = row["us_per_step"]
            if row["verified"] == 0:
                of_case["none"] = row["us_per_step"]
    complete = {}
    for case, times in of_cases.items():
        if case[:3] in plain and len(times) == 2:
            complete[case] = times | {"off": plain[case[:3]]}
    return complete


def time_of(times: dict, drafting: float) -> float:
    """Returns the mean time of steps of which a share ``drafting`` verifies drafts.

    A step with fewer drafts than it has rows takes as long as one with all.
    """
    return times["none"] + (times["all"] - times["none"]) * drafting


def speeds(replayed: list[dict], rows: list[dict]) -> list[dict]:
    """Returns the speed of every kind of text over plain decoding, for each measured number of drafts."""
    result = []
    for (bits, context, count, drafts), times in step_times(rows).items():
        for text in replayed:
            if text["drafts"] == drafts:
                none_drafts = (1 - text["drafting"] / text["steps"]) ** count
                time = time_of(times, 1 - none_drafts)
                row = {"kind": text["kind"], "bits": bits, "context": context, "texts": count}
                row |= {"drafts": drafts, "speed": round(text["tokens_per_step"] * times["off"] / time, 3)}
                result.append(row)
    return result


def chosen_speeds(by_kind: dict[str, list[Replay]], rows: list[dict]) -> list[dict]:
    """Returns the speed of one text over plain decoding, with the drafts that the decode loop chooses."""
    times, result = step_times(rows), []
    shapes = step_shapes([1], MOST_DRAFTS, contiguous=True)
    cases = dict.fromkeys((bits, context) for bits, context, count, _ in times if count == 1)
    for (bits, context), kind in itertools.product(cases, by_kind):
        if not all((bits, context, 1, shape.drafts) in times for shape in shapes):
            continue

        def seconds(shape: StepShape, drafting: float, case=(bits, context)) -> float:
            return time_of(times[*case, 1, shape.drafts], drafting)

        taken = speculation_replay.chosen_seconds(by_kind[kind], shapes, CHUNK_STEPS, seconds)
        tokens = sum(len(replay.answer) - 1 for replay in by_kind[kind])
        speed = tokens * times[bits, context, 1, 0]["off"] / taken
        result.append({"kind": kind, "bits": bits, "context": context, "speed": round(speed, 3)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--model", default=str(BUNDLED_MODEL), help="model whose tokenizer the replay uses (default: bundled)"
    )
    add(
        "--shapes", nargs="*", default=["Qwen3-8B"], help="shapes to time (default: Qwen3-8B; none: no times)"
    )
    add("--layers", type=int, metavar="N", help="keep the first N layers (default: all)")
    add("--bits", nargs="+", type=float, default=[3, 4, 2, 8], metavar="B", help="(default: 3 4 2 8)")
    add("--contexts", nargs="+", type=int, default=[1024], metavar="N")
    add("--batch", nargs="+", type=int, default=[1, 4, 2, 8], metavar="N", help="texts (default: 1 4 2 8)")
    drafts = speculation_replay.DRAFTS
    add("--drafts", nargs="+", type=int, default=drafts, choices=drafts, help=f"(default: {drafts})")
    add("--steps", type=int, default=16, metavar="N", help="steps of a call (default: 16)")
    add("--repeats", type=int, default=5, metavar="N", help="timed calls (default: 5)")
    add("--no-self", action="store_true", help=f"do not time {SELF}")
    add("--profile", type=int, default=6, metavar="N", help="profile the first N programs (default: 6)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    fields = {name: [] for name in ("replay", "speed", "chosen", "steps")} | {"profiles": {}}
    report = reports.Report(args, host=platform.machine(), **fields)
    by_kind = speculation_replay.replays(pathlib.Path(args.model))
    replayed = report.fields["replay"] = speculation_replay.sums(by_kind)
    for row in replayed:
        print(
            f"{row['kind']}, {row['drafts']} drafts: {row['tokens_per_step']} tokens a step, "
            f"{row['acceptance']} accepted"
        )

    def save() -> None:
        rows = report.fields["steps"]
        report.fields |= {"speed": speeds(replayed, rows), "chosen": chosen_speeds(by_kind, rows)}
        report.save()

    for shape in args.shapes:
        config = random_model.shape(shape)
        if args.layers is not None:
            config = dataclasses.replace(config, layers=config.layers[: args.layers])
        timed_steps(config, random_model.label(shape), args, report, save)
    for row in (*report.fields["speed"], *report.fields["chosen"]):
        say(str(row))
    report.finish()


if __name__ == "__main__":
    main()
