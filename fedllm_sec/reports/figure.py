"""The papers' figure: a metric of the server's model, round by round, a line for each arm."""

from collections.abc import Sequence
from pathlib import Path

from fedllm_sec.reports.read import Run, label
from fedllm_sec.updates.files import atomic_file

TITLES = {
    "test_loss": "Test loss (nats per response token)",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
}
MARKERS = "osD^vPX*"
STROKES = ("-", "-.", "--", ":")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too


def draw(runs: Sequence[Run], metric: str, folder: Path) -> list[Path]:
    """Draw one metric as `<metric>.png` and `<metric>.svg`; return the paths."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    everything: list[float] = []
    for i, (run, curve) in enumerate((one, curve) for one in runs for curve in one.curves):
        rounds, values = curve.values(metric)
        everything += values
        axes.plot(
            rounds,
            values,
            label=label(run, curve, len(runs) == 1),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=STROKES[i % len(STROKES)],  # a curve that lies on another one shows through
            linewidth=2.0,
            markersize=5,
        )
    majority = runs[0].curves[0].last.get("majority_accuracy")
    if metric == "accuracy" and majority is not None:
        axes.axhline(majority, color="0.5", linestyle=":", label=f"commonest label ({majority:.1%})")
    if everything and min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
    axes.set_xlabel("Round")
    axes.set_ylabel(TITLES.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    paths = [folder / f"{metric}.png", folder / f"{metric}.svg"]
    with mpl.rc_context({"svg.hashsalt": "fedllm_sec"}):  # the same data, the same bytes
        for path in paths:
            with atomic_file(path) as partial:
                stamp = {"Date": None} if path.suffix == ".svg" else {}
                figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=stamp)
    return paths
