"""Formats the rows of a sweep as a Markdown table, for a document or a terminal."""

from collections.abc import Sequence

from checkpoints_tools.pareto.rows import ACCURACY, Row
from grinqh_jax.decoding.bits import FULL
from grinqh_jax.evaluation.result import with_error


def markdown(rows: Sequence[Row]) -> str:
    """Returns the table of the rows of one text or one file of problems, under its name."""
    accuracy = rows[0]["measure"] == ACCURACY
    bits = ["bits read, layers", "with the output projection"]
    measured = ["accuracy"] if accuracy else ["perplexity", "above full precision", "KL", "same top token"]
    lines = [["", "bits", *bits, *measured], ["---"] * (4 + len(measured))]
    for before, row in zip([None, *rows], rows, strict=False):
        label = row["label"] if before is None or before["label"] != row["label"] else ""
        cells = [label, f"{row['bits']:g}" if row["bits"] != FULL else "16"]
        cells += [f"{row['bits_read_layers']:.3f}", f"{row['bits_read_with_head']:.3f}"]
        lines.append(cells + (_accuracy(row) if accuracy else _perplexity(row)))
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    unit = f"{rows[0]['n']} problems" if accuracy else f"{rows[0]['tokens']} predicted tokens"
    return f"\n{rows[0]['data']}, {unit}\n\n{body}\n"


def _perplexity(row: Row) -> list[str]:
    return [
        with_error(row["perplexity"], row["stderr"], ".2f"),
        with_error(row["difference"], row["difference_stderr"], ".2f"),
        with_error(row["kl"], row["kl_stderr"], ".4f"),
        f"{row['same_top1']:.1%}",
    ]


def _accuracy(row: Row) -> list[str]:
    return [with_error(row["accuracy"], row["stderr"], ".1%")]
