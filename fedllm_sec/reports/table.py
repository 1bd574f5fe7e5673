"""The results of a run in a table."""

from collections.abc import Sequence

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
    head = ["arm", "round", *(title for _, title, _ in shown)]
    body = [["before training", "0", *(form.format(first[metric]) for metric, _, form in shown)]]
    for run in runs:
        for curve in run.curves:
            values = [form.format(curve.last[metric]) for metric, _, form in shown]
            body.append([label(run, curve, len(runs) == 1), str(curve.last["round"]), *values])
    return head, body


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
