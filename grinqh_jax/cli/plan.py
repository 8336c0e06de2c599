"""The verb ``plan``: says on how many devices a model fits, before anything is loaded."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from grinqh_jax.cli import command, flags

DEVICES = (1, 2, 4, 8)
"""Numbers of devices that are compared by default."""

DEFAULT_CONTEXT = 8192
"""Tokens of a context by default, if the model has so many positions."""

COLUMNS = ("weights", "devices", "weights", "other", "cache", "work", "total", "fits")


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax plan",
        description="Say what a model needs on each device of a mesh, and whether it fits, from its "
        "configuration alone. Sizes are in GB of 10**9 bytes. The column other has embedding, norms, routers "
        "and tables, which every device has; work is an estimate of temporary memory.",
    )
    add = result.add_argument
    add("model", metavar="MODEL", help="directory, hub id, or name of a published shape such as Qwen3-8B")
    add(
        "--devices",
        type=flags.positive,
        metavar="N",
        help="number of devices (default: a row for each of 1, 2, 4 and 8)",
    )
    add("--memory", type=flags.size, metavar="SIZE", help="memory of one device, such as 80G")
    add(
        "--context",
        type=flags.positive,
        metavar="N",
        help=f"tokens of a text (default: the model's limit, but at most {DEFAULT_CONTEXT})",
    )
    add("--slots", type=flags.positive, default=1, metavar="N", help="texts at once (default: 1)")
    add("--json", action="store_true", help="print one JSON object per line, not a table")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_plan, parser(), argv)


def _plan(args: argparse.Namespace) -> int:
    from grinqh_jax.json_files import json_line

    config, stored = _model(args.model)
    context = args.context or min(config.max_position_embeddings, DEFAULT_CONTEXT)
    counts = DEVICES if args.devices is None else (args.devices,)
    rows = [
        row(config, devices, max_bits, context=context, slots=args.slots, memory=args.memory)
        for max_bits in stored
        for devices in counts
    ]
    if args.json:
        for each in rows:
            print(json_line({"model": args.model} | each))
        return 0
    print(f"{args.model}: {args.slots} x {context} tokens, GB on each device")
    print("\n".join(lines(rows)))
    return 0


def row(
    config, devices: int, max_bits: int | None, *, context: int, slots: int, memory: int | None
) -> dict[str, Any]:
    """Returns what a model needs on each device, as a JSON object.

    Args:
      config: Configuration of the model.
      devices: Number of devices.
      max_bits: Stored bits; None for bfloat16.
      context: Tokens of a text.
      slots: Number of texts.
      memory: Bytes of a device, if they are known.

    Returns:
      ``weights_stored``, ``devices``, and in bytes ``weights``, ``other``, ``cache``, ``work``, ``total``;
      with ``memory`` also ``fits`` and ``tokens_that_fit``, the tokens of all texts whose cache fits. Or
      ``problem``, why the model cannot be cut among so many devices.
    """
    from grinqh_jax.decoding.paged_cache import FREE_MEMORY_SHARE
    from grinqh_jax.errors import UsageError
    from grinqh_jax.sharding.memory import device_memory

    result: dict[str, Any] = {
        "weights_stored": "bf16" if max_bits is None else f"{max_bits} bits",
        "devices": devices,
    }
    try:
        needs = device_memory(config, devices, max_bits, context)
    except UsageError as error:
        return result | {"problem": str(error)}
    tokens = slots * context
    result |= {
        "weights": needs.weights,
        "other": needs.other,
        "cache": tokens * needs.cache_token + slots * needs.slot,
        "work": needs.work,
        "total": needs.total(tokens, slots),
    }
    if memory is not None:
        fitting = needs.tokens_that_fit(memory, slots, FREE_MEMORY_SHARE)
        result |= {"fits": fitting >= tokens, "tokens_that_fit": fitting}
    return result


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows as lines of a table."""
    result = ["".join(f"{title:>9}" for title in COLUMNS)]
    for each in rows:
        start = f"{each['weights_stored']:>9}{each['devices']:>9}"
        if "problem" in each:
            result.append(f"{start}  {each['problem']}")
            continue
        sizes = (f"{each[key] / 1e9:>9.2f}" for key in ("weights", "other", "cache", "work", "total"))
        verdict = ""
        if "fits" in each:
            verdict = f"{'yes' if each['fits'] else 'no':>9}, {each['tokens_that_fit']} tokens fit"
        result.append(start + "".join(sizes) + verdict)
    return result


def _model(name: str) -> tuple[Any, list[int | None]]:
    """Returns the configuration of a model, and in how many bits its weights are or can be stored.

    Raises:
      GrinqhError: There is no such model or shape, or it is not supported.
    """
    from grinqh_jax.benchmarking import random_model
    from grinqh_jax.hf.reader import resolve
    from grinqh_jax.json_files import read_object
    from grinqh_jax.model.config import ModelConfig

    if name in random_model.hf_configs():
        return random_model.shape(name), [8, 6, 4, None]
    hf_config = read_object(pathlib.Path(resolve(name)) / "config.json")
    quantization = hf_config.get("quantization_config")
    config = ModelConfig.from_hf(hf_config)
    if isinstance(quantization, dict) and "max_bits" in quantization:
        return config, [quantization["max_bits"]]
    return config, [8, 6, 4, None]
