"""The figures of an audit's page: heat maps of layers, and the z-scores; adapters are n, modules m."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.audit.findings import Audit, Statistics
from fedllm_sec.audit.output.clients_map import clients_map
from fedllm_sec.audit.output.words import plotted
from fedllm_sec.reports.heat_map import ink

Matrix = NDArray[np.float64]
FAILED, PASSED = "#D55E00", "#0072B2"  # told apart by colour-blind readers too; their shapes differ as well
GROUP = 4  # of fewer adapters a median tells nothing
NUMBERED = 12  # with so many rows and columns at most, cells have their numbers
LABELS = 60  # so many names at most along an axis
NAMED = 6  # outliers that are named for each score
SCALED = 1.4826  # a normal distribution's standard deviation over its MAD


class Picture(NamedTuple):
    """A figure, and what it shows."""

    title: str
    note: str
    figure: Any


class Heat(NamedTuple):
    """What one heat map shows."""

    title: str
    note: str
    values: Matrix
    colours: str
    limits: tuple[float | None, float | None] = (None, None)


def pictures(audit: Audit) -> list[Picture]:
    """All figures that the statistics allow."""
    known = audit.statistics
    if known is None or not known.adapters:
        return []
    failed = [audit.fails(name) for name in known.adapters]
    limit = threshold(audit)
    drawn = [Picture(heat.title, heat.note, draw_heat(heat, known, failed)) for heat in heats(known, limit)]
    figures = [clients_map(known, failed), strips(known, failed, limit) if known.z else None]
    titles = (
        ("The updates as a map", "Classical scaling of the distances between whole updates; near is alike."),
        ("Each adapter beside the others", "Robust z-scores; dashed: the policy's threshold."),
    )
    told = zip(titles, figures, strict=True)
    return [*(Picture(*title, figure) for title, figure in told if figure is not None), *drawn]


def threshold(audit: Audit) -> float | None:
    """The policy's limit of z-scores; None where it names none."""
    value = audit.policy.get("thresholds", {}).get("z")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def heats(known: Statistics, limit: float | None) -> list[Heat]:
    """The heat maps: of length, of concentration, and of what stands out of its column."""
    if not known.modules:
        return []
    maps = []
    if (norm := known.measures.get("norm")) is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log10(norm)
        what = "log10 of the norm of each module's update"
        maps.append(Heat("Length, layer by layer", f"{what}; grey: zero, or not known.", log, "Blues"))
    if (top1 := known.measures.get("top1")) is not None:
        what = "Share of the squared norm in the largest singular value"
        maps.append(Heat("Concentration, layer by layer", f"{what}; grey: not known.", top1, "Purples", (0, 1)))
    if norm is not None and len(known.adapters) >= GROUP:
        most = 2 * (limit or 6.0)
        what = f"|norm - median| over the column's MAD x {SCALED:.4g}, up to {most:g}"
        title = "Length beside the others, layer by layer"
        maps.append(Heat(title, f"{what}; grey: not known.", np.abs(deviation(norm)), "Oranges", (0, most)))
    return maps


def deviation(values: Matrix) -> Matrix:
    """(n, m) robust z-scores by column; where half of a column is equal, infinite but for that half."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of columns that are all NaN
        finite = np.where(np.isfinite(values), values, np.nan)
        apart = finite - np.nanmedian(finite, axis=0)
        spread = SCALED * np.nanmedian(np.abs(apart), axis=0)
        scores: Matrix = np.where(apart == 0, 0.0, apart / spread)
    return scores


def draw_heat(heat: Heat, known: Statistics, failed: Sequence[bool]) -> Any:
    """One heat map, adapters by modules."""
    from matplotlib.figure import Figure

    n, m = len(known.adapters), len(known.modules)
    few = n <= NUMBERED and m <= NUMBERED
    width, height = (0.62 * m, 0.34 * n) if few else (max(0.062 * m, 5.0), max(0.17 * n, 1.0))
    figure = Figure(figsize=(min(max(width + 3.2, 6.0), 16.0), min(height + 2.2, 15.0)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    values = np.where(np.isnan(heat.values) | np.isneginf(heat.values), np.nan, heat.values)
    finite = values[np.isfinite(values)]
    low, high = heat.limits
    low = low if low is not None else float(finite.min(initial=np.inf)) if finite.size else 0.0
    high = high if high is not None else float(finite.max(initial=-np.inf)) if finite.size else 1.0
    high = high if high > low else low + 1.0
    drawn = axes.imshow(np.clip(values, low, high), cmap=heat.colours, vmin=low, vmax=high, aspect="auto")
    if few:
        write_numbers(axes, values, drawn)
    ticks = module_ticks(known.modules)
    names = [plotted(short_module(known.modules[tick]), 34) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90 if m > 4 else 20, fontsize=7, ha="center" if m > 4 else "right")
    rows = range(0, n, -(-n // (2 * LABELS)))
    marks = [f"! {plotted(known.adapters[row])}" if failed[row] else plotted(known.adapters[row]) for row in rows]
    axes.set_yticks(rows, marks, fontsize=7)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(FAILED if failed[row] else "black")
    axes.tick_params(length=2)
    figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.01, extend="max" if (finite > high).any() else "neither")
    return figure


def write_numbers(axes: Any, values: Matrix, drawn: Any) -> None:
    """The number of each cell in it."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = f"{value:.2g}" if np.isfinite(value) else ">"
            colour = ink(drawn.cmap(drawn.norm(value)))
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def short_module(name: str) -> str:
    """`base_model.model.gpt_neox.layers.3.attention.query_key_value` -> `3.attention.query_key_value`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), max(len(parts) - 2, 0))
    return ".".join(parts[first:])


def module_ticks(modules: Sequence[str]) -> list[int]:
    """Which modules are named along the axis: all if they are few, else the first ones of layers."""
    if len(modules) <= LABELS:
        return list(range(len(modules)))
    layer: Callable[[str], str] = lambda name: short_module(name).partition(".")[0]  # noqa: E731
    starts = [i for i, name in enumerate(modules) if i == 0 or layer(name) != layer(modules[i - 1])]
    if len(starts) < LABELS // 10:
        starts = list(range(len(modules)))
    return starts[:: -(-len(starts) // LABELS)]


def strips(known: Statistics, failed: Sequence[bool], limit: float | None) -> Any:
    """The z-scores, a strip of points for each score."""
    from matplotlib.figure import Figure

    names = list(known.z)
    figure = Figure(figsize=(9.0, 0.75 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    broken = np.array(failed, dtype=bool)
    largest = least = 0.0
    for row, name in enumerate(names):
        z = np.asarray(known.z[name], dtype=np.float64)
        finite = np.isfinite(z)
        largest, least = float(z[finite].max(initial=largest)), float(z[finite].min(initial=least))
        for who, marker, colour in ((finite & ~broken, "o", PASSED), (finite & broken, "^", FAILED)):
            axes.scatter(z[who], spread_out(z, row)[who], marker=marker, c=colour, s=22, alpha=0.75, linewidths=0)
        name_outliers(axes, known.adapters, z, row, limit)
    scale_axis(axes, largest, least, limit)
    for edge in () if limit is None else (-limit, limit):
        axes.axvline(edge, color="0.35", linestyle="--", linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [plotted(name) for name in names])
    axes.set_xlabel("robust z-score; triangles: adapters that fail")
    axes.grid(alpha=0.3, axis="x")
    return figure


def scale_axis(axes: Any, largest: float, least: float, limit: float | None) -> None:
    """Linear up to the threshold; beyond it logarithmic, where some are far out."""
    edge = limit or 6.0
    far = max(largest, -least)
    low, high = 1.25 * (min(least, -edge) if least < 0 else -0.1 * edge), 1.25 * max(largest, edge)
    if far > 4 * edge:
        axes.set_xscale("symlog", linthresh=edge, linscale=2.5)
        decades = [float(10**power) for power in range(1, 300) if edge * 1.5 < 10**power <= 2 * far]
        decades = decades[:: -(-len(decades) // 5)] if decades else []
        ticks = [-edge, -edge / 2, 0.0, edge / 2, edge, *decades, *(-tick for tick in decades)]
        axes.set_xticks([tick for tick in ticks if low <= tick <= 2 * high], labels=None)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        low, high = (2 * low if least < -edge else low), 2 * high
    axes.set_xlim(low, high)


def spread_out(z: Matrix, row: int) -> Matrix:
    """Heights of points around their row, so that neighbours do not cover each other; the same at every run."""
    order = np.argsort(np.argsort(z, kind="stable"), kind="stable")
    return row + np.array([0.0, 0.16, -0.16, 0.08, -0.08])[order % 5]


def name_outliers(axes: Any, adapters: Sequence[str], z: Matrix, row: int, limit: float | None) -> None:
    """Write the names of the points that are past the threshold, from the farthest."""
    sizes = np.nan_to_num(np.abs(z), nan=0.0, posinf=0.0, neginf=0.0)
    past = [i for i in np.argsort(-sizes, kind="stable") if limit is not None and sizes[i] > limit]
    for rank, i in enumerate(past[:NAMED]):
        up = 0.34 if rank % 2 else -0.34
        axes.text(z[i], row + up, plotted(adapters[i], 22), ha="center", va="center", fontsize=6.5, color="0.25")
