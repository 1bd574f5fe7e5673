"""The measured rows as Markdown tables and as a figure."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
GROUPS = {
    "sgd": "one SGD step",
    "adamw": "AdamW, as in the federation",
    "sgd_r8": "one SGD step, r = 8",
    "alone_r32": "one sentence, r = 32",
}


def markdown(rows: Rows) -> str:
    """Two tables: words, and images."""
    words = {name: row for name, row in rows.items() if "leaks" in row}
    images = {name: row for name, row in rows.items() if "psnr" in row}
    parts = []
    if words:
        heads = [f"{title}: recall / precision (most recall) / certificate" for title in GROUPS.values()]
        body = [
            [row["label"], *(told(row["leaks"].get(group, ())) for group in GROUPS), percent(row["accuracy"])]
            for row in words.values()
        ]
        parts.append(table(["defense", *heads, "accuracy"], body))
    if images:
        attacks = list(dict.fromkeys(name for row in images.values() for name in row["psnr"]))
        body = [
            [row["label"], *(decibels(row["psnr"][name]) for name in attacks), percent(row["accuracy"])]
            for row in images.values()
        ]
        parts.append(table(["defense", *(f"{name}: dB (most)" for name in attacks), "accuracy"], body))
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(leaks: Sequence[Mapping[str, Any]]) -> str:
    """Means over batches, and the highest recall of any: `98 % / 100 % (100 %) / 0.97`."""
    if not leaks:
        return "-"
    recall, precision, certificate = ([leak[key] for leak in leaks] for key in ("recall", "precision", "certificate"))
    mean = statistics.mean
    return f"{mean(recall):.0%} / {mean(precision):.0%} ({max(recall):.0%}) / {mean(certificate):.2f}"


def decibels(values: Sequence[float]) -> str:
    """The mean, and the best image for the attacker."""
    return f"{statistics.mean(values):.1f} ({max(values):.1f})"


def percent(values: Sequence[float]) -> str:
    """The mean; of several seeds with the range."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def draw(rows: Rows, path: Path) -> None:
    """Recall against accuracy, a point for each defense and optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = {name: row for name, row in rows.items() if "leaks" in row and row["accuracy"]}
    if not words:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), sharex=True, sharey=True)
    for axis, group in zip(axes, ("sgd", "adamw"), strict=True):
        points = []
        for row in words.values():
            recall = statistics.mean(leak["recall"] for leak in row["leaks"][group])
            points.append((100 * recall, 100 * statistics.mean(row["accuracy"]), row["label"]))
        axis.scatter([x for x, _, _ in points], [y for _, y, _ in points], color="#1f4e79", zorder=3)
        label(axis, points)
        axis.set_title(f"words read from {GROUPS[group]}")
        axis.set_xlabel("distinct tokens recovered, % (mean of the batches)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy of the federation, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, moved apart where they would lie on one another."""
    axis.set_xlim(-4, 135)
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    step = (high - low + 6) / 32
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: (-point[1], point[0])):
        at = y
        while any(abs(at - other) < step and abs(x - there) < 32 for there, other in placed):
            at -= step / 4
        placed.append((x, at))
        axis.annotate(
            name, (x, y), (x + 2.5, at), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.5},
        )  # fmt: skip
