"""The results of a run in a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedllm_sec.reports.read import Run, label

COLUMNS = (
    ("test_loss", "test loss", "{:.3f}"),
    ("perplexity", "perplexity", "{:.4g}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("macro_f1", "macro-F1", "{:.1%}"),
)


def rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: before any training, then each arm after its last round."""
    first = runs[0].curves[0].rounds[0]
    shown = [column for column in COLUMNS if column[0] in first]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [cell(row, key, form) for key, _, form in shown]

    head = ["arm", "round", *(title for _, title, _ in shown)]
    body = [["before training", "0", *cells(first)]]
    body += [
        [label(run, curve, len(runs) == 1), str(curve.last["round"]), *cells(curve.last)]
        for run in runs
        for curve in run.curves
    ]
    return head, body


def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    """A metric in words."""
    if key not in row:
        return "-"
    return "diverged" if row[key] is None else form.format(row[key])


def results_table(runs: Sequence[Run]) -> Table:
    """The same for the terminal."""
    head, body = rows(runs)
    majority = runs[0].curves[0].last.get("majority_accuracy")
    table = Table(caption=f"commonest label alone: {majority:.1%} accuracy" if majority is not None else None)
    for title in head:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for row in body:
        table.add_row(*row)
    return table
