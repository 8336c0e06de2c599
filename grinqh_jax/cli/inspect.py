"""The verb ``inspect``: describes a checkpoint, and names everything in it that is not supported."""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grinqh_jax.cli import command


def parser() -> command.Parser:
    """Returns the parser of the verb's flags."""
    result = command.Parser(
        prog="grinqh-jax inspect",
        description="Say what a checkpoint is: its family, options and sizes, the bits that it stores, and "
        "whether it is supported. If it is not, everything that is in the way is named. Reads the "
        "configuration and the headers of the files, and no weights. Exits with 0 if the checkpoint is "
        "supported, with 2 if it is not.",
    )
    result.add_argument("model", metavar="DIR_OR_HUB_ID", help="Hugging Face or GRINQH checkpoint")
    result.add_argument("--json", action="store_true", help="print a JSON object")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code (see ``command``)."""
    return command.run(_inspect, parser(), argv)


def _inspect(args: argparse.Namespace) -> int:
    from grinqh_jax.hf.reader import resolve
    from grinqh_jax.hf.survey import survey_checkpoint
    from grinqh_jax.json_files import json_line

    survey = survey_checkpoint(resolve(args.model))
    report = report_of(survey)
    if args.json:
        print(json_line(report))
    else:
        print("\n".join(_lines(report)))
    return 0 if report["supported"] else command.USAGE_ERROR


def report_of(survey) -> dict[str, Any]:
    """Returns the report on a checkpoint as a JSON object.

    Args:
      survey: Result of ``hf.survey.survey_checkpoint``.

    Returns:
      ``model``, ``format`` (``huggingface``, ``grinqh`` or ``unknown``), ``supported`` and ``problems`` (one
      line each). As far as they are known also ``family``, ``options``, ``sizes``, ``parameters``,
      ``parameters_read_per_token`` (only of a mixture of experts; those in linear layers), ``stored``
      (``bytes``, and ``bits_per_weight`` of the linear layers or ``dtypes``), ``computed_by_xla`` (parts of a
      decode step that have no GPU kernel for these options) and ``basis`` (the one that the checkpoint has or
      that a conversion takes).
    """
    from grinqh_jax.model.options import missing_kernels, options, rotation_obstacle

    hf_config = survey.hf_config or {}
    quantization = hf_config.get("quantization_config")
    grinqh = isinstance(quantization, dict) and quantization.get("quant_method") == "grinqh"
    if grinqh:
        stored, problems = _grinqh(survey)
    else:
        stored, problems = _huggingface(survey), [*survey.config_problems, *survey.problems]
    report: dict[str, Any] = {
        "model": str(survey.directory),
        "format": "grinqh" if grinqh else "huggingface" if survey.hf_config is not None else "unknown",
        "supported": not problems,
        "problems": problems,
    }
    if (config := survey.config) is None:
        return report | {"family": hf_config.get("model_type"), "stored": stored}
    obstacle, mixture = rotation_obstacle(config), config.num_experts > 0
    basis = "principal" if obstacle is None else f"original: {obstacle}"
    return report | {
        "family": config.family,
        "options": options(config) + [f"{part} is left out" for part in _left_out(survey)],
        "sizes": {
            "layers": config.num_layers,
            "hidden": config.hidden_size,
            "intermediate": config.intermediate_size,
            **({"experts": config.num_experts, "expert_intermediate": config.expert_size} if mixture else {}),
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocab_size,
            "context": config.max_position_embeddings,
        },
        "parameters": _parameters(config),
        **({"parameters_read_per_token": _read_per_token(config)} if mixture else {}),
        "stored": stored,
        "computed_by_xla": missing_kernels(config),
        "basis": stored.get("provenance", {}).get("basis", basis),
    }


def _left_out(survey) -> list[str]:
    """Returns the parts of a checkpoint that are not read."""
    from grinqh_jax.model.families import FAMILIES

    parts = ["the vision tower"] if survey.config.has_vision else []
    for part, pattern in FAMILIES[survey.config.family].left_out.items():
        if any(re.fullmatch(pattern, name) for name in survey.tensors):
            parts.append(part)
    return list(dict.fromkeys(parts))


def _parameters(config) -> int:
    """Returns the number of weights; a tied output projection counts once."""
    from grinqh_jax.model.layer_spec import HEAD
    from grinqh_jax.model.parameters import parameter_shapes

    shapes = parameter_shapes(config)
    if config.tie_word_embeddings:
        del shapes[f"{HEAD}.kernel"]
    return sum(math.prod(shape) for arrays in shapes.values() for shape in arrays)


def _read_per_token(config) -> int:
    """Returns the number of weights that a token reads: those of chosen experts, and no embedding."""
    from grinqh_jax.model.weight_counts import weights_read

    return sum(weights_read(config).values())


def _huggingface(survey) -> dict[str, Any]:
    """Returns what a Hugging Face checkpoint stores."""
    sizes: dict[str, int] = {}
    for dtype, shape in survey.tensors.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    files = sorted(set(survey.files.values()))
    return {"bytes": sum(file.stat().st_size for file in files), "files": len(files), "dtypes": sizes}


def _grinqh(survey) -> tuple[dict[str, Any], list[str]]:
    """Returns what a GRINQH checkpoint stores, and its problems."""
    from grinqh_jax.checkpoint import QuantizationConfig
    from grinqh_jax.checkpoint.manifest import Manifest
    from grinqh_jax.checkpoint.version_1 import stored_tree
    from grinqh_jax.errors import CheckpointError
    from grinqh_jax.model.decoder import abstract_tree

    problems = list(survey.config_problems)
    try:
        quantization = QuantizationConfig.from_json(survey.hf_config["quantization_config"])
        manifest = Manifest.read(survey.directory)
    except CheckpointError as error:
        return {}, [*problems, str(error)]
    problems += _size_problems(survey.directory, manifest)
    if survey.config is not None:
        tree = abstract_tree(survey.config, quantization.max_bits, len(quantization.targets))
        version = survey.hf_config["quantization_config"]["version"]
        problems += manifest.tree_problems(stored_tree(tree, version))
    provenance = quantization.provenance
    return {
        "bytes": sum(size for size, _ in manifest.files.values()),
        "max_bits": quantization.max_bits,
        "bits_per_weight": provenance.get("bits_per_weight_stored"),
        "provenance": provenance,
    }, problems


def _size_problems(directory: Path, manifest) -> Iterator[str]:
    """Yields files that are missing or have another size than the manifest says; reads none."""
    for name, (size, _) in manifest.files.items():
        file = directory / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes instead of {size}"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """Yields the report as lines for people."""
    yield f"{report['model']}: {_FORMATS[report['format']]}"
    if report.get("family"):
        yield f"family      {report['family']}"
    if "sizes" in report:
        yield "options     " + ("; ".join(report["options"]) or "none")
        sizes = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in report["sizes"].items())
        yield f"sizes       {sizes}"
        read = report.get("parameters_read_per_token")
        yield f"parameters  {report['parameters']:,}" + (f", {read:,} read for each token" if read else "")
    yield "stored      " + _stored(report["stored"])
    if "sizes" in report:
        yield f"basis       {report['basis']}"
        by_xla = report["computed_by_xla"]
        yield "kernels     " + (
            "all parts of a decode step" if not by_xla else "not " + "; not ".join(by_xla)
        )
    yield "supported   " + ("yes" if report["supported"] else "no")
    for problem in report["problems"]:
        yield f"  {problem}"


_FORMATS = {
    "grinqh": "a GRINQH checkpoint",
    "huggingface": "a Hugging Face checkpoint",
    "unknown": "no checkpoint",
}


def _stored(stored: dict[str, Any]) -> str:
    if "max_bits" in stored:
        bits = stored["bits_per_weight"]
        read = f", {bits:g} bits per weight with scales and padding" if bits else ""
        return f"{stored['bytes']:,} bytes, codes of {stored['max_bits']} bits{read}"
    if "dtypes" in stored:
        dtypes = ", ".join(f"{count:,} of {dtype}" for dtype, count in stored["dtypes"].items())
        return f"{stored['bytes']:,} bytes in {stored['files']} files" + (f": {dtypes}" if dtypes else "")
    return "unknown"
