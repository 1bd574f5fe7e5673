"""The measured rows as Markdown tables and as a figure."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STRETCH = 6  # the power of the accuracy to which its axis is linear: most points lie near the top
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
    """Recall against accuracy, a numbered point for each defense, a panel for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = [row for row in rows.values() if "leaks" in row and row["accuracy"]]
    if not words:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 8), sharex=True)
    for axis, group in zip(axes, ("sgd", "adamw"), strict=True):
        points = [
            (100 * mean_of(row["leaks"][group], "recall"), 100 * statistics.mean(row["accuracy"]), str(number))
            for number, row in enumerate(words, 1)
            if group != "sgd" or "the update's rms" not in row["label"]
        ]
        axis.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=24, color="#1f4e79", zorder=3)
        numbered(axis, points)
        axis.set_title(f"words read from {GROUPS[group]}")
        axis.set_xlabel("distinct tokens recovered, % (mean of the batches)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy of the federation, % (mean of the seeds)")
    legend = "\n".join(f"{number:>2}  {row['label']}" for number, row in enumerate(words, 1))
    figure.text(0.74, 0.93, legend, va="top", fontsize=10, linespacing=1.5, family="monospace")
    figure.text(0.74, 0.1, "upper left: hides much, costs little", fontsize=10, style="italic")
    figure.subplots_adjust(left=0.05, right=0.72, top=0.94, bottom=0.08, wspace=0.1)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def mean_of(leaks: Sequence[Mapping[str, Any]], key: str) -> float:
    """Over batches."""
    return statistics.mean(leak[key] for leak in leaks)


def numbered(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Numbers beside the points, with a line to the point where they had to be moved apart."""
    axis.set_xlim(-9, 112)
    axis.set_yscale("function", functions=(lambda y: y**STRETCH, lambda y: y ** (1 / STRETCH)))
    axis.set_ylim(50, 90)
    axis.set_yticks([50, 60, 70, 75, 80, 82, 84, 86, 88, 90])
    taken = [(x, y) for x, y, _ in points]
    for x, y, number in sorted(points, key=lambda point: (-point[1], point[0])):
        places = [(x + side, y + up) for side in (4, 9, 14, -4, -9) for up in (0, 0.6, -0.6, 1.2, -1.2, 1.8, -1.8)]
        free = [place for place in places if all(apart(place, other) for other in taken)]
        at = min(free, key=lambda place: abs(place[0] - x) / 5 + abs(place[1] - y))
        taken.append(at)
        axis.annotate(
            number, (x, y), at, fontsize=10, va="center", ha="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkA": 6, "shrinkB": 3},
        )  # fmt: skip


def apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two numbers do not lie on one another, in the units of the axes."""
    return abs(one[0] - other[0]) >= 3.9 or abs(one[1] - other[1]) >= 0.59
