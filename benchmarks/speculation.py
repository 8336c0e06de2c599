"""Replays fixed texts through prompt lookup, and times steps that verify drafts.

    python benchmarks/speculation.py --output benchmarks/results/speculation.json        both, on a GPU
    python benchmarks/speculation.py --shapes --model qwen3-8b-grinqh                    only the replay
    python benchmarks/speculation.py --shapes Qwen3-0.6B --layers 2 --contexts 128       a quick check

The replay has three kinds of texts, made from the texts of this repository: free prose, summaries that quote
their document, and edits of code and prose. It supposes that the model writes exactly the given answer, so it
tells what the drafter can contribute, not what a model writes. The times are those of whole steps with random
weights, drafts included. The script takes them first; the replay's tokens per step and these times give the
speed over plain decoding.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import re

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import report as reports
from report import say

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.benchmarking import measure, random_model
from grinqh_jax.decoding.dial import Dial
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.decoding.speculation import block_dial
from grinqh_jax.decoding.speculation.chunk import SlotTexts, speculative_chunk
from grinqh_jax.decoding.speculation.drafter import DrafterState
from grinqh_jax.decoding.speculation.lookup import LEAST_MATCHED, MOST_MATCHED, PromptLookup, look_up
from grinqh_jax.model.flat_model import FlatModel, decoder_of
from grinqh_jax.text.tokenizer import Tokenizer

DATA = pathlib.Path(__file__).parents[1] / "checkpoints_tools" / "data" / "mixed"
DRAFTS = (1, 3, 7, 15)
FREE_PROMPT_SHARE = 0.3
"""Share of a free text that is its prompt."""

RENAMED = {"layout": "storage", "words": "units", "tokens": "symbols", "rows": "lines", "return": "yield"}
"""Words that the edits replace."""


def texts() -> list[tuple[str, str, str]]:
    """Returns the kind, the prompt and the answer of every text."""

    def read(name: str) -> list[str]:
        lines = (DATA / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]

    prose, code = read("prose.jsonl"), read("source_code.jsonl")
    result = []
    for text in prose:
        cut = text.index(" ", int(FREE_PROMPT_SHARE * len(text)))
        result.append(("free", text[:cut], text[cut:]))
        sentences = re.split(r"(?<=[.!?]) ", text)
        quotes = " ".join(f'The text says: "{sentence}"' for sentence in sentences[1::4])
        result.append(("quotes", f"Summarize with quotes:\n\n{text}\n\nSummary:\n\n", quotes))
    for text in [*code, *prose]:
        edited = text
        for old, new in RENAMED.items():
            edited = re.sub(rf"\b{old}\b", new, edited)
        edited = re.sub(r"\bwas\b", "is", edited) if text in prose else edited
        if edited != text:
            result.append(("edits", f"Edit this text:\n\n{text}\n\nEdited:\n\n", edited))
    return result


def replay(tokenizer: Tokenizer, prompt: str, answer: str, in_blocks: bool) -> dict[int, dict[str, int]]:
    """Returns steps, drafts and accepted drafts of an answer, by the largest number of drafts.

    Args:
      tokenizer: Tokenizer of the model that writes the answer.
      prompt, answer: The text.
      in_blocks: Whether steps end at the blocks of the dial (``block_dial``).
    """
    start = tokenizer.encode(prompt)
    tokens = np.array(start + tokenizer.encode(answer, special_tokens=False), np.int32)
    # The first token comes from the prefill. All proposals are made at once, and the steps then pick theirs.
    positions = np.arange(len(start) + 1, len(tokens))
    slots = -(-len(tokens) // 256) * 256
    padded = np.zeros(slots, np.int32)
    padded[: len(tokens)] = tokens
    proposals = []
    for piece in np.array_split(positions, -(-len(positions) // 64)):
        lengths = np.zeros(64, np.int32)
        lengths[: len(piece)] = piece
        draft = _look_up(jnp.asarray(np.tile(padded, (64, 1))), jnp.asarray(lengths))
        rows = zip(np.asarray(draft.tokens), np.asarray(draft.counts), strict=True)
        proposals += [row[:count] for row, count in rows][: len(piece)]
    figures = {}
    for most in (0, *DRAFTS):
        place, counts = len(start) + 1, {"steps": 0, "drafting": 0, "drafted": 0, "accepted": 0}
        while place < len(tokens):
            left = len(tokens) - place - 1
            if in_blocks:
                left = min(left, block_dial.BLOCK - 1 - (place - len(start) - 1) % block_dial.BLOCK)
            draft = proposals[place - len(start) - 1][: min(most, left)]
            equal = draft == tokens[place : place + len(draft)]
            accepted = int(np.argmin([*equal, False]))
            counts["steps"] += 1
            counts["drafting"] += len(draft) > 0
            counts["drafted"] += len(draft)
            counts["accepted"] += accepted
            place += accepted + 1
        figures[most] = counts
    return figures


_look_up = jax.jit(lambda tokens, lengths: look_up(tokens, lengths, DRAFTS[-1], LEAST_MATCHED, MOST_MATCHED))


def replayed(model: str) -> list[dict]:
    """Returns the sums of ``replay`` over all texts, by kind and number of drafts."""
    tokenizer, sums = Tokenizer.load(pathlib.Path(model)), {}
    for kind, prompt, answer in texts():
        for most, counts in replay(tokenizer, prompt, answer, in_blocks=True).items():
            total = sums.setdefault((kind, most), dict.fromkeys(counts, 0))
            for name, count in counts.items():
                total[name] += count
    rows = []
    for (kind, most), counts in sums.items():
        row = {"kind": kind, "drafts": most, **counts}
        row["tokens_per_step"] = round((counts["steps"] + counts["accepted"]) / counts["steps"], 3)
        row["acceptance"] = round(counts["accepted"] / counts["drafted"], 3) if counts["drafted"] else None
        rows.append(row)
        print(f"{kind}, {most} drafts: {row['tokens_per_step']} tokens a step, {row['acceptance']} accepted")
    return rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlwaysDrafts(PromptLookup):
    """Prompt lookup that always has drafts, so that all rows of a step read weights."""

    def propose(self, state, target, texts, count):
        draft, state, cache = super().propose(state, target, texts, count)
        return dataclasses.replace(draft, counts=jnp.full_like(draft.counts, count)), state, cache


def timed_steps(config, label: str, args, report: reports.Report) -> None:
    """Records the times of steps by bits, number of texts, drafts and context.

    All programs compile in parallel before the first measurement.
    """
    model, policy, rows = random_model.graded(config), DecodePolicy.for_device(), report.fields["steps"]
    flat = FlatModel(model)

    @jax.jit(static_argnames=("drafts",), donate_argnames="cache")
    def run(flat, cache, dial, last, texts, limits, drafts):
        batch = len(last)
        return speculative_chunk(
            decoder_of(flat),
            last,
            jnp.zeros(batch, bool),
            cache,
            dial,
            Sampling.create(batch),
            jnp.full(1, -1, jnp.int32),
            limits,
            texts,
            AlwaysDrafts(),
            DrafterState(),
            jnp.full(batch, drafts, jnp.int32),
            steps=args.steps,
            drafts=drafts,
            policy=policy,
        )[:2]

    def dial_of(bits: float, batch: int) -> Dial:
        # Held, because the blocks of a dial that follows would cut drafts of random texts.
        return dataclasses.replace(Dial.create(model, random_model.TARGETS, [bits] * batch), held=True)

    caches, others, arguments = {}, {}, {}
    for context, batch in itertools.product(args.contexts, args.batch):
        room = args.steps * (1 + DRAFTS[-1]) + 16
        cache = caches[context, batch] = measure.filled_cache(model, context, room, batch)
        tokens = jax.random.randint(jax.random.key(1), (batch, cache.capacity), 0, config.vocab_size)
        texts = SlotTexts(tokens, jnp.zeros((batch, 4), jnp.float32))
        others[context, batch] = tokens[:, context], texts, jnp.full(batch, room, jnp.int32)
        for drafts in (0, *DRAFTS):
            if batch * (drafts + 1) <= 16:
                dial = dial_of(args.bits[0], batch)
                arguments[context, batch, drafts] = flat, cache, dial, *others[context, batch], drafts
    programs = reports.compile_all(dict.fromkeys(arguments, run), arguments)
    say(f"{label}: compiled {len(programs)} programs")
    for (context, batch, drafts), bits in itertools.product(programs, args.bits):
        if report.out_of_time(f"{label}, context {context}, {batch} texts, {drafts} drafts, {bits} bits"):
            continue
        program, dial, rest = programs[context, batch, drafts], dial_of(bits, batch), others[context, batch]

        def once(program=program, dial=dial, rest=rest, case=(context, batch)):
            lengths = jnp.full(case[1], case[0], jnp.int32)
            start = dataclasses.replace(caches[case], lengths=lengths)
            chunk, caches[case] = program(flat, start, dial, *rest)
            return chunk

        timing = measure.timed(once, args.steps, args.repeats)
        row = {
            "shape": label,
            "bits": bits,
            "context": context,
            "texts": batch,
            "drafts": drafts,
            "us_per_step": round(1e6 / timing.mean, 1),
        }
        rows.append(row)
        say(str(row))
        report.save()


def speeds(replayed_rows: list[dict], timed_rows: list[dict]) -> list[dict]:
    """Returns the speed of every kind of text over plain decoding, for each measured shape of a step."""
    plain = {(r["bits"], r["context"], r["texts"]): r["us_per_step"] for r in timed_rows if not r["drafts"]}
    rows = []
    for step in timed_rows:
        for text in replayed_rows:
            if text["drafts"] == step["drafts"] > 0:
                case = step["bits"], step["context"], step["texts"]
                times = text["tokens_per_step"] * plain[case] / step["us_per_step"]
                keys = ("bits", "context", "texts", "drafts")
                row = {"kind": text["kind"], **{key: step[key] for key in keys}, "speed": round(times, 3)}
                rows.append(row)
    return rows


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
    add("--bits", nargs="+", type=float, default=[3, 4], metavar="B")
    add("--contexts", nargs="+", type=int, default=[1024], metavar="N")
    add("--batch", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="texts (default: 1 2 4 8)")
    add("--steps", type=int, default=16, metavar="N", help="steps of a call (default: 16)")
    add("--repeats", type=int, default=5, metavar="N", help="timed calls (default: 5)")
    reports.add_arguments(parser)
    args = parser.parse_args()
    report = reports.Report(args, host=platform.machine(), replay=[], steps=[], speed=[])
    for shape in args.shapes:
        config = random_model.shape(shape)
        if args.layers is not None:
            config = dataclasses.replace(config, layers=config.layers[: args.layers])
        timed_steps(config, random_model.label(shape), args, report)
    fields = report.fields
    if not report.out_of_time("the replay"):
        fields["replay"] = replayed(args.model)
        fields["speed"] = speeds(fields["replay"], fields["steps"])
        for row in fields["speed"]:
            say(str(row))
    report.finish()


if __name__ == "__main__":
    main()
