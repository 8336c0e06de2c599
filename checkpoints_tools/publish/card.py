"""The model card of a checkpoint: ``README.md`` with the hub's metadata.

The card is no part of the checkpoint: the manifest does not list it, so it can be edited.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from checkpoints_tools.publish.origin import CARD, UNKNOWN, Origin
from grinqh_jax.checkpoint.quantization import QuantizationConfig
from grinqh_jax.errors import CheckpointError, UsageError
from grinqh_jax.json_files import read_object
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.model.weight_counts import weights_stored
from grinqh_jax.text.documents import read_records

PROJECT = "GRINQH-JAX"
START, END = "<!-- quality -->", "<!-- end of quality -->"
"""Comments around the measured table."""

_NOT_MEASURED = (
    "Not measured. `grinqh-jax perplexity --model DIR --data FILE --json` measures it, and `grinqh-jax"
    " publish --model DIR --results FILE` writes the table here."
)


def write_card(directory: Path, origin: Origin) -> Path:
    """Writes the card of a checkpoint and returns its path.

    Args:
      directory: A GRINQH checkpoint.
      origin: Its source.

    Raises:
      CheckpointError: ``config.json`` is damaged or not that of a GRINQH checkpoint.
    """
    path = directory / CARD
    path.write_text(render(directory, origin), encoding="utf-8")
    return path


def write_results(directory: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Replaces the measured table in the card of a checkpoint.

    Args:
      directory: A GRINQH checkpoint with a card.
      results: Rows of ``perplexity --json``, by name of the text.

    Raises:
      UsageError: The card lacks the two comments that enclose the table.
    """
    path = directory / CARD
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UsageError(f"{path}: put {START} and {END} where the measured table belongs")
    enclosed = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    block = f"{START}\n{_table(results)}\n{END}"
    path.write_text(enclosed.sub(lambda _: block, text, count=1), encoding="utf-8")


def render(directory: Path, origin: Origin) -> str:
    """Returns the text of the card, without measurements. Raises as ``write_card`` does."""
    hf_config = read_object(directory / "config.json")
    quantization = QuantizationConfig.from_json(hf_config.get("quantization_config"))
    config = ModelConfig.from_hf(hf_config)
    made = quantization.provenance
    data = ModelCardData(
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=list(origin.languages) or None,
        base_model=origin.hub_id,
        base_model_relation="quantized" if origin.hub_id else None,
        library_name="grinqh-jax",
        pipeline_tag="text-generation",
        tags=["grinqh", "jax", "quantized"],
    )
    weights = sum(weights_stored(config).values())
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and file.name != CARD)
    stored = made.get("bits_per_weight_stored")
    facts = {
        "source": origin.name,
        "architecture": f"{config.family}, {config.num_layers} layers, hidden size {config.hidden_size}",
        "weights in linear layers": f"{weights / 1e6:,.1f} million",
        "format": f"{PROJECT}, checkpoint version {hf_config['quantization_config'].get('version')}",
        "codes": f"nested, {quantization.max_bits} bits; the dial goes from {quantization.targets[0]:g} to"
        f" {quantization.targets[-1]:g} mean bits",
        "stored": f"{size / 1e6:,.1f} MB"
        + (f", {stored:g} bits per weight with scales and padding" if stored else ""),
        "context": f"{config.max_position_embeddings} tokens",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
{data.to_yaml().strip()}
---
# {origin.name}, GRINQH

{_link(origin)} in nested bit planes of {PROJECT}: one stored copy, read at the bits that each request sets.

| | |
|---|---|
{rows}

## Use

```sh
grinqh-jax generate --model DIR_OR_HUB_ID --bits 3 --prompt "Why is the sky blue?"
```

## Quality

{START}
{_NOT_MEASURED}
{END}

## How it was made

```json
{json.dumps(made, indent=2)}
```

## Licence

{_licence(origin)}
"""


def _link(origin: Origin) -> str:
    return f"[{origin.name}](https://huggingface.co/{origin.hub_id})" if origin.hub_id else origin.name


def _licence(origin: Origin) -> str:
    if origin.license == UNKNOWN:
        return "Licence of the source: unknown: check it before you publish this checkpoint."
    name = origin.license_name or origin.license
    link = f" ({origin.license_link})" if origin.license_link else ""
    return f"Licence of the source: {name}{link}. It covers this checkpoint, which is derived from it, too."


def _table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the table, and its legend."""
    lines = [
        "| text | bits asked | bits read | perplexity | KL divergence | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for text, rows in results.items():
        for row in rows:
            error = row.get("stderr")
            perplexity = f"{row['perplexity']:.2f}" + (f" ± {error:.2f}" if error is not None else "")
            lines.append(
                f"| {text} | {row['bits']} | {row['realised_bits']:.2f} | {perplexity} | {row['kl']:.4f}"
                f" | {100 * row['same_top1']:.1f} % |"
            )
    tokens = ", ".join(f"{text}: {rows[0]['tokens']:,} tokens" for text, rows in results.items())
    return "\n".join(lines) + (
        f"\n\nEvery token was graded as in decoding ({tokens}). KL divergence in nats, from the reference of"
        " the measurement, by default this checkpoint at full precision. Bits exclude scales (0.125 bits)."
    )


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of ``perplexity --json``.

    Raises:
      UsageError: The file cannot be read, or a line is not such a row.
    """
    rows = read_records(path, _result, "the fields of `perplexity --json`")
    if not rows:
        raise UsageError(f"{path} holds no results; write it with `perplexity --json`")
    return rows


def _result(row: Any) -> dict[str, Any] | None:
    numbers = ("realised_bits", "perplexity", "kl", "same_top1", "tokens")
    if not isinstance(row, dict) or "bits" not in row:
        return None
    return row if all(isinstance(row.get(name), int | float) for name in numbers) else None


def check_checkpoint(directory: Path) -> None:
    """Raises CheckpointError if a directory does not hold a complete GRINQH checkpoint."""
    config = read_object(directory / "config.json")
    if "quantization_config" not in config or not (directory / "manifest.json").is_file():
        raise CheckpointError(f"{directory} is not a GRINQH checkpoint; convert the model first")
