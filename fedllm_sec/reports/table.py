"""The results of runs in a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedllm_sec.reports.read import FLOOR, LEAKAGE, SUCCESS, Group, label

COLUMNS = (
    ("test_loss", "test loss", "{:.3f}"),
    ("perplexity", "perplexity", "{:.4g}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("client_accuracy", "clients' own", "{:.1%}"),
    ("macro_f1", "macro-F1", "{:.1%}"),
    (SUCCESS, "attack success", "{:.1%}"),
    ("lifespan", "rounds it lived on", "{:.0f}"),
    (f"{LEAKAGE}psnr", "PSNR of images", "{:.1f} dB"),
    (f"{LEAKAGE}label_recall", "classes found", "{:.1%}"),
    (f"{LEAKAGE}token_recall", "tokens found", "{:.1%}"),
    (f"{LEAKAGE}token_precision", "of them right", "{:.1%}"),
    (f"{LEAKAGE}rouge_l", "ROUGE-L", "{:.1%}"),
    ("frechet_pca", "Fréchet distance", "{:.4g}"),
    ("discriminator_loss", "discriminator loss", "{:.3f}"),
    ("generator_loss", "generator loss", "{:.3f}"),
)


def rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: before any training, then each arm after its last round; of several seeds mean and range."""
    known = set().union(*(curve.measured for group in groups for run in group.runs for curve in run.curves))
    shown = [column for column in COLUMNS if column[0] in known]

    def cells(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
        return [cell([value_of(row, key) for row in seeds], form) for key, _, form in shown]

    head = ["arm", "round", *(title for _, title, _ in shown)]
    alone = len(groups) == 1
    body = []
    for group in groups:
        before = [run.curves[0].rounds[0] for run in group.runs]
        body.append(["before training" if alone else f"{group.name}: before training", "0", *cells(before)])
        for arm in group.arms:
            last = [{**curve.leaked, **curve.last} for curve in group.curves(arm)]
            reached = sorted({row["round"] for row in last})
            body.append(
                [label(group, arm, alone), " to ".join(map(str, {reached[0]: 0, reached[-1]: 0})), *cells(last)]
            )
    return head, body


def value_of(row: Mapping[str, Any], metric: str) -> Any:
    """A metric of a round, or '-'; an unattacked arm's success is the floor of the attacks, if that is one number."""
    if metric == SUCCESS and metric not in row:
        floors = {value for key, value in row.items() if key.startswith(FLOOR)}
        return floors.pop() if len(floors) == 1 else "-"
    return row.get(metric, "-")


def cell(values: Sequence[Any], form: str) -> str:
    """A metric in words: of one run, or mean (least to greatest) of several; '-' stands for what was not measured."""
    if "-" in values:
        return "-"
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return "diverged" if not finite else f"diverged in {len(values) - len(finite)} of {len(values)}"
    mean = form.format(sum(finite) / len(finite))
    return mean if len(finite) == 1 else f"{mean} ({form.format(min(finite))} to {form.format(max(finite))})"


def results_table(groups: Sequence[Group]) -> Table:
    """The same for the terminal."""
    head, body = rows(groups)
    majority = groups[0].runs[0].curves[0].last.get("majority_accuracy")
    table = Table(caption=f"commonest label alone: {majority:.1%} accuracy" if majority is not None else None)
    for title in head:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for row in body:
        table.add_row(*row)
    return table
