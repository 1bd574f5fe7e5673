"""The papers' figure: a metric of the server's model, round by round, a line for each arm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.reports.read import LEAKAGE, SHARES, SUCCESS, Group, label
from fedllm_sec.updates.files import atomic_file

TITLES = {
    "test_loss": "Test loss (nats)",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "client_accuracy": "Accuracy of the clients' own networks",
    "macro_f1": "Macro-F1",
    "attack_success": "Success of the attack",
    "stealth/norm_ratio": "Length of malicious updates, by the median benign one",
    "stealth/cosine": "Cosine of malicious updates to the benign mean",
    "stealth/krum_rank": "Krum rank of malicious updates (0: chosen first)",
    "leakage/psnr": "PSNR of reconstructed images (dB)",
    "leakage/ssim": "SSIM of reconstructed images",
    "leakage/mse": "Mean squared error of reconstructed images",
    "leakage/matched": "Images for which one was reconstructed",
    "leakage/label_accuracy": "Reconstructed images whose label is right",
    "leakage/label_recall": "Classes that were found",
    "leakage/label_precision": "Found classes that were there",
    "leakage/label_exact": "Sets of classes that are exact",
    "leakage/label_count_l1": "Error of the classes' counts (sum)",
    "leakage/token_recall": "Distinct tokens that were found",
    "leakage/token_precision": "Found tokens that were there",
    "leakage/rouge_1": "ROUGE-1 F1 of reconstructed texts",
    "leakage/rouge_2": "ROUGE-2 F1 of reconstructed texts",
    "leakage/rouge_l": "ROUGE-L F1 of reconstructed texts",
    "leakage/exact": "Texts that are exact",
    "leakage/prefix": "Text that is right up to the first error",
    "frechet_pca": "Squared Fréchet distance",
    "discriminator_loss": "Loss of the discriminator (nats)",
    "generator_loss": "Loss of the generator (nats)",
}
NO_CURVE = {f"{LEAKAGE}{name}" for name in ("mse", "matched", "label_exact", "label_count_l1", "rouge_1", "rouge_2")}
MARKERS = "osD^vPX*"
STROKES = ("-", "-.", "--", ":")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too

LONG = 24  # characters; a name of more would cover the lines
CROWD = 5  # with more lines, no corner is free for the legend
MARKED = 25  # so many markers at most on a line


def draw(groups: Sequence[Group], metric: str, folder: Path) -> list[Path]:
    """Draw one metric as PNG and SVG named after it; return the paths. The same data, the same bytes."""
    return save(picture(groups, metric), folder, metric.replace("/", "_"))


def save(figure: Any, folder: Path, stem: str) -> list[Path]:
    """Write a matplotlib figure as PNG and SVG; the same figure, the same bytes."""
    import matplotlib as mpl

    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
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

    lines = lines_of(groups, metric)
    names = [label(group, arm, len(groups) == 1) + note for group, arm, _, note in lines]
    crowded = len(lines) > CROWD
    figure = Figure(figsize=(8.4 if crowded else 6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    everything: list[float] = []
    for i, (group, arm, measured, _) in enumerate(lines):
        everything += draw_arm(axes, group, arm, measured, names[i], i)
    if metric == SUCCESS:
        shade_attacks(axes, groups)
    majority = groups[0].runs[0].curves[0].last.get("majority_accuracy")
    if metric == "accuracy" and majority is not None:
        axes.axhline(majority, color="0.5", linestyle=":", label=f"commonest label ({majority:.1%})")
    if metric not in SHARES and everything and min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
    if metric in SHARES and metric.startswith(LEAKAGE):
        axes.set_ylim(-0.03, 1.03)  # nothing and all are what such a share is compared with
    if note := seeds_note(groups):
        axes.set_title(note, fontsize=10)
    axes.set_xlabel("Round")
    axes.set_ylabel(TITLES.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if max(map(len, names), default=0) > LONG:
        figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    elif crowded:
        figure.legend(loc="outside right upper", fontsize="small")
    else:
        axes.legend()
    return figure


def lines_of(groups: Sequence[Group], metric: str) -> list[tuple[Group, str, str, str]]:
    """What to draw: group, arm, metric, and what to add to the arm's name.

    Of an attack's success an unattacked arm has its floors.
    """
    lines = []
    for group, arm in [(one, arm) for one in groups for arm in one.arms]:
        curve = group.curves(arm)[0]
        if metric in curve.measured:
            lines.append((group, arm, metric, ""))
        elif metric == SUCCESS:
            lines += [(group, arm, floor, f" (floor of {of})") for floor, of in curve.floors.items()]
    return lines


def shade_attacks(axes: Any, groups: Sequence[Group]) -> None:
    """Grey behind the rounds in which somebody attacks, where that is not in all."""
    rows = [row for group in groups for run in group.runs for curve in run.curves for row in curve.rounds]
    attacked = {row["round"] for row in rows if row.get("malicious")}
    if attacked < {row["round"] for row in rows if row["round"]}:
        for index in sorted(attacked):
            axes.axvspan(index - 0.5, index + 0.5, color="0.93", linewidth=0, zorder=0)


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
