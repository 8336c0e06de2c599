"""Converts a model with several settings, and measures each result, and fixed precision, on several texts.

    python benchmarks/conversion_quality.py --model DIR_OR_GGUF --data wiki.txt chat.jsonl
        --work DIR --output FILE --fixed rtn:4 gptq:4 awq:4
        --variants 'default:' '4 bits stored: --max-bits 4' 'bound 0.4: refitted_codes.EXCESS=0.4'

A variant is a label, flags of the converter, and constants of ``checkpoints_tools.convert``. Conversations
(``messages`` in a ``.jsonl`` file) are rendered with the model's chat template. All measurements compare with
the unquantized model, in float32. A killed run resumes: FILE's variants are not measured again.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import shlex
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints_tools.baselines import model as baselines
from checkpoints_tools.calibration import documents
from checkpoints_tools.calibration.text import DEFAULT_TOKENS, read_calibration
from checkpoints_tools.convert import command, compilation, driver
from checkpoints_tools.convert.plan import make_plan
from checkpoints_tools.convert.sizes import bits_per_weight_stored, directory_bytes
from checkpoints_tools.source.open import open_source
from grinqh_jax import checkpoint
from grinqh_jax.evaluation.perplexity import measure
from grinqh_jax.hf import load_decoder, open_checkpoint
from grinqh_jax.text.tokenizer import Tokenizer

BITS = ("1.5", "2", "2.5", "3", "4", "full")


def read_data(path: pathlib.Path, tokenizer: Tokenizer, tokens: int) -> np.ndarray:
    """Returns the first ``tokens`` token ids of a file, conversations as the template writes them."""
    text, most = "", 8 * tokens  # characters
    for document in documents.read(path):
        text += ("\n\n" if text else "") + documents.render(document, tokenizer)
        if len(text) > most:
            break
    return np.array(tokenizer.encode(text[:most])[:tokens], np.int32)


def converted(source, words: list[str], work: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Converts with the flags and constants ``words``; returns the checkpoint and what it took."""
    constants = [word.partition("=") for word in words if _is_constant(word)]
    flags = [word for word in words if not _is_constant(word)]
    args = command.parser().parse_args(["--model", "-", "--out", str(work), *flags])
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if constants:  # Compiled programs contain the values that the constants had.
            jax.clear_caches()
            stack.callback(jax.clear_caches)
        for name, _, value in constants:
            module, _, constant = name.partition(".")
            module = importlib.import_module(f"checkpoints_tools.convert.{module}")
            stack.enter_context(mock.patch.object(module, constant, json.loads(value)))
        calibration = read_calibration(source, args.calib, args.tokens)
        plan = make_plan(source, calibration, command.options_of(args))
        out = driver.convert(plan, work, overwrite=True)
    facts = {
        "seconds": round(time.monotonic() - start, 1),
        "calibration_tokens": int(calibration.windows.size),
        "bits_per_weight_stored": round(bits_per_weight_stored(source.config, args.max_bits), 3),
        "bytes_on_disk": directory_bytes(out),
        "not_done": plan.not_done,
    }
    return out, facts


def _is_constant(word: str) -> bool:
    """Returns whether a word of a variant is ``MODULE.CONSTANT=VALUE``."""
    return word.partition("=")[0].rpartition(".")[2].isupper()


def device_bytes(model) -> int:
    """Returns the bytes of all arrays of a model."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def measured(model, targets, data, bits, reference, length: int) -> dict:
    """Returns KL, perplexity and bits read of each text at each setting."""
    rows = {}
    for name, tokens in data.items():
        results = measure(model, targets, tokens, bits, sequence_length=length, reference=reference)
        rows[name] = {
            str(r.bits): {
                "kl": round(r.kl, 6),
                "kl_stderr": r.kl_stderr and round(r.kl_stderr, 6),
                "perplexity": round(r.perplexity, 4),
                "realised_bits": r.realised_bits and round(r.realised_bits, 4),
                "same_top1": round(r.same_top1, 4),
            }
            for r in results
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_GGUF", help="unquantized model")
    add("--data", nargs="+", type=pathlib.Path, required=True, metavar="FILE", help="texts to measure")
    add("--variants", nargs="*", default=["default:"], metavar="'LABEL: FLAGS'", help="default: the default")
    add("--converted", nargs="*", default=[], metavar="'LABEL: DIR'", help="finished checkpoints")
    add("--fixed", nargs="*", default=[], metavar="METHOD:BITS", help="rtn, gptq or awq, and bits")
    add("--bits", nargs="+", default=BITS, metavar="B", help="settings (default: 1.5 2 2.5 3 4 full)")
    add("--tokens", type=int, default=4096, metavar="N", help="tokens of each text (default: 4096)")
    add("--sequence-length", type=int, default=512, metavar="L", help="tokens per window (default: 512)")
    add("--work", type=pathlib.Path, required=True, metavar="DIR", help="directory for the checkpoints")
    add("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    settings = [bits if bits == "full" else float(bits) for bits in args.bits]

    jax.config.update("jax_default_matmul_precision", "highest")
    compilation.prepare()
    source = open_source(args.model)
    tokenizer = Tokenizer.load(source.directory)
    data = {path.stem: read_data(path, tokenizer, args.tokens) for path in args.data}
    reference = load_decoder(source, jnp.float32)
    report = {"rows": {}} if not args.output.exists() else json.loads(args.output.read_text())
    report |= {
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens": {name: len(tokens) for name, tokens in data.items()},
    }

    def keep(label: str, row: dict) -> None:
        report["rows"][label] = row
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        kl = {text: [r["kl"] for r in by_bits.values()] for text, by_bits in row["texts"].items()}
        print(f"{label}: {row.get('seconds')} s, KL {kl}", flush=True)

    def keep_graded(label: str, row: dict, directory: pathlib.Path) -> None:
        loaded = checkpoint.load(directory, jnp.float32)
        row |= {"bytes_on_device": device_bytes(loaded.model)}
        row["texts"] = measured(
            loaded.model, loaded.quantization.targets, data, settings, reference, args.sequence_length
        )
        keep(label, row)

    args.work.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        label, _, flags = variant.partition(":")
        if label in report["rows"]:
            continue
        out, row = converted(source, shlex.split(flags), args.work / "out")
        keep_graded(label, row | {"flags": flags.strip()}, out)
    for existing in args.converted:
        label, _, directory = existing.partition(":")
        if label not in report["rows"]:
            keep_graded(label, {}, pathlib.Path(directory.strip()))
    windows = read_calibration(source, [], DEFAULT_TOKENS).windows if args.fixed else None
    for name in args.fixed:
        method, _, bits = name.partition(":")
        if name in report["rows"]:
            continue
        out, start = args.work / f"{method}-{bits}", time.monotonic()
        baselines.quantize(source, windows, out, baselines.Options(method=method, bits=int(bits)))
        row = {"seconds": round(time.monotonic() - start, 1)}
        model = load_decoder(open_checkpoint(out), jnp.float32)
        row["texts"] = measured(model, None, data, ["full"], reference, args.sequence_length)
        keep(name, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
