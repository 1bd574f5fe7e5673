"""The papers' figure: a metric of the server's model, round by round, a line for each arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.reports.read import SHARES, Group, label
from fedllm_sec.updates.files import atomic_file

TITLES = {
    "test_loss": "Test loss (nats)",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "client_accuracy": "Accuracy of the clients' own networks",
    "macro_f1": "Macro-F1",
    "frechet_pca": "Squared Fréchet distance",
    "discriminator_loss": "Loss of the discriminator (nats)",
    "generator_loss": "Loss of the generator (nats)",
}
MARKERS = "osD^vPX*"
STROKES = ("-", "-.", "--", ":")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too

CROWD = 5  # with more lines, no corner is free for the legend
MARKED = 25  # so many markers at most on a line


def draw(groups: Sequence[Group], metric: str, folder: Path) -> list[Path]:
    """Draw one metric as `<metric>.png` and `<metric>.svg`; return the paths. The same data, the same bytes."""
    import matplotlib as mpl

    figure = picture(groups, metric)
    paths = [folder / f"{metric}.png", folder / f"{metric}.svg"]
    with mpl.rc_context({"svg.hashsalt": "fedllm_sec"}):  # else the names inside are drawn at random
        for path in paths:
            with atomic_file(path) as partial:
                stamp = {"Date": None} if path.suffix == ".svg" else {}
                figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=stamp)
    return paths


def picture(groups: Sequence[Group], metric: str) -> Any:
    """The matplotlib figure: one line an arm, the mean over its seeds, in a band from the least to the greatest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    crowded = sum(len(group.arms) for group in groups) > CROWD
    figure = Figure(figsize=(8.4 if crowded else 6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    everything: list[float] = []
    for i, (group, arm) in enumerate((one, arm) for one in groups for arm in one.arms):
        everything += draw_arm(axes, group, arm, metric, label(group, arm, len(groups) == 1), i)
    majority = groups[0].runs[0].curves[0].last.get("majority_accuracy")
    if metric == "accuracy" and majority is not None:
        axes.axhline(majority, color="0.5", linestyle=":", label=f"commonest label ({majority:.1%})")
    if metric not in SHARES and everything and min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
    if note := seeds_note(groups):
        axes.set_title(note, fontsize=10)
    axes.set_xlabel("Round")
    axes.set_ylabel(TITLES.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if crowded:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend()
    return figure


def draw_arm(axes: Any, group: Group, arm: str, metric: str, name: str, i: int) -> list[float]:
    """Draw the `i`-th line, with its band where there are several seeds, and return the values that it covers."""
    rounds, values = group.values(arm, metric)
    colour = COLOURS[i % len(COLOURS)]
    axes.plot(
        rounds,
        [sum(seeds) / len(seeds) for seeds in values],
        label=name,
        color=colour,
        marker=MARKERS[i % len(MARKERS)],
        linestyle=STROKES[i % len(STROKES)],  # a curve that lies on another one shows through
        linewidth=2.0,
        markersize=5,
        markevery=-(-len(rounds) // MARKED) or 1,
    )
    if len(group.curves(arm)) > 1:
        low, high = [min(seeds) for seeds in values], [max(seeds) for seeds in values]
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    return [value for seeds in values for value in seeds]


def seeds_note(groups: Sequence[Group]) -> str:
    """What lines and bands are where there are several seeds; '' where each run stands alone."""
    counts = sorted({len(group.runs) for group in groups} - {1})
    return f"Lines: mean of {' or '.join(map(str, counts))} seeds; bands: least to greatest" if counts else ""
