"""The heat maps of a matrix, attacks by defenses: the clean metric and the success of the attacks, and a page."""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedllm_sec.reports.figure import TITLES, save
from fedllm_sec.reports.page import STYLE, html_table, image
from fedllm_sec.reports.read import LEAKAGE, SHARES, SUCCESS
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_text

FLOOR = "floor"
HIDES = "How well it hides"
MAPS = {SUCCESS: "Oranges"}  # of one hue each, dark is much: told apart by colour-blind readers too
WIDTH, HEIGHT = 0.82, 0.58  # inches of a cell
NOTES = 150  # characters in a line below the maps
Cell = Mapping[str, Any]


class Grid(NamedTuple):
    """A number of every cell: (attacks, defenses) each, NaN where there is none."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def grid(result: Mapping[str, Any], key: str) -> Grid:
    """Means and spreads over seeds of one number, as `matrix.json` has them."""
    shape = len(result["attacks"]), len(result["defenses"])
    mean, spread = np.full(shape, np.nan), np.full(shape, np.nan)
    for place, cell in cells_of(result).items():
        for values, array in ((cell["mean"], mean), (cell["spread"], spread)):
            if values.get(key) is not None:
                array[place] = values[key]
    return Grid(mean, spread)


def cells_of(result: Mapping[str, Any]) -> dict[tuple[int, int], Cell]:
    """The cells by row and column."""
    rows, columns = list(result["attacks"]), list(result["defenses"])
    return {(rows.index(cell["attack"]), columns.index(cell["defense"])): cell for cell in result["cells"]}


def number(value: float | None, metric: str) -> str:
    """A share in per cent, anything else in three digits."""
    if value is None or np.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:.3g}"


def words(cell: Cell, metric: str, seeds: int, *, floor: bool = False) -> str:
    """A cell's mean ± spread, and of how many seeds if not of all; '' where there is nothing to say."""
    mean, spread = cell["mean"].get(metric), cell["spread"].get(metric)
    measured = [numbers[metric] for numbers in cell["seeds"].values() if metric in numbers]
    if not measured:
        return ""
    known = sum(value is not None for value in measured)
    text = "diverged" if mean is None else number(mean, metric)
    if spread is not None:
        text += f" ±{number(spread, metric)}"
    if floor and cell["mean"].get(FLOOR) is not None:
        text += f"\nfloor {number(cell['mean'][FLOOR], metric)}"
    return text + (f"\n{known} of {seeds}" if 0 < known < seeds else "")


def reason(cell: Cell) -> str:
    """Why a cell, or a part of it, is empty; ''."""
    if cell["impossible"]:
        return f"cannot be: {cell['impossible']}"
    return "; ".join(dict.fromkeys(f"failed: {text}" for text in cell["failed"].values()))


def reasons(result: Mapping[str, Any]) -> list[str]:
    """All reasons, each once."""
    return list(dict.fromkeys(text for cell in result["cells"] if (text := reason(cell))))


def picture(result: Mapping[str, Any]) -> Any:
    """The matplotlib figure: two heat maps side by side, and below them why cells are empty."""
    from matplotlib.figure import Figure

    rows, columns, told = len(result["attacks"]), len(result["defenses"]), reasons(result)
    lines = [line for i, text in enumerate(told, 1) for line in textwrap.wrap(f"[{i}] {text}", NOTES)]
    size = (2 * (WIDTH * columns + 1.6), HEIGHT * rows + 2.0 + 0.16 * len(lines))
    figure = Figure(figsize=(max(size[0], 9.0), max(size[1], 3.6)), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_map(figure, left, result, result["metric"])
    draw_map(figure, right, result, SUCCESS)
    figure.suptitle(caption(result), fontsize=10)
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left")
    return figure


def caption(result: Mapping[str, Any]) -> str:
    """What a number is the mean of."""
    seeds, last, rounds = len(result["seeds"]), result["last"], result["rounds"]
    when = f"rounds {rounds - last + 1} to {rounds}" if last > 1 else f"round {rounds}"
    over = f", over {seeds} seeds ± sample standard deviation" if seeds > 1 else ""
    return f"{result['name']}: mean of {when}{over}"


def draw_map(figure: Any, axes: Any, result: Mapping[str, Any], metric: str) -> None:
    """Draw one heat map, its numbers in its cells."""
    from matplotlib.patches import Rectangle

    values = grid(result, metric).mean
    finite = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if metric in SHARES or not finite.size else (float(finite.min()), float(finite.max()))
    colours = MAPS.get(metric, "Blues")
    drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    told, seeds = reasons(result), len(result["seeds"])
    for (row, column), cell in cells_of(result).items():
        text, why = words(cell, metric, seeds, floor=metric == SUCCESS).replace(" ±", "\n±"), reason(cell)
        if not np.isfinite(values[row, column]):
            hatch = "////" if why else None
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.94", edgecolor="0.75", linewidth=0, hatch=hatch))
        if why:
            text = f"{text}\n[{told.index(why) + 1}]".strip()
        colour = ink(drawn.cmap(drawn.norm(values[row, column]))) if np.isfinite(values[row, column]) else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(result["defenses"])), result["defenses"], rotation=35, ha="left")
    axes.set_yticks(range(len(result["attacks"])), result["attacks"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title(title(metric), fontsize=11)
    figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)


def title(metric: str) -> str:
    """Of a heat map."""
    name = TITLES.get(metric, metric) + (" (%)" if metric in SHARES else "")
    return f"{name}; grey: it has no aim of its own" if metric == SUCCESS else name


def ink(colour: Sequence[float]) -> str:
    """Black or white, whichever is read more easily on a colour (its relative luminance, by WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def matrix_report(folder: Path) -> Path:
    """Draw a finished matrix into `report/` of its folder, and return the page.

    Raises:
        InputError: if the folder holds no finished matrix.
    """
    if not (folder / "matrix.json").is_file():
        raise InputError(f"{folder}: holds no finished matrix (no matrix.json)")
    result, paid = read_json(folder / "matrix.json"), read_json(folder / "cost.json")
    out = folder / "report"
    out.mkdir(exist_ok=True)
    drawing = save(picture(result), out, "heat_map")[1]
    write_text(out / "index.html", page(result, paid, drawing, (folder / "config.yaml").read_text(encoding="utf-8")))
    return out / "index.html"


def page(result: Mapping[str, Any], paid: Mapping[str, Any], drawing: Path, config: str) -> str:
    """The page's text."""
    name = escape(str(result["name"]))
    saved = (
        f"{paid['seconds']:,.0f} seconds of rounds, of all processes together. Of {paid['trainings']:,} trainings of a "
        f"client {paid['shared']:,} ({paid['share']:.0%}) had been done for another cell, from the same bytes, and "
        "were not done again."
    )
    wide = ".wide img { width: 100%; height: auto; } body { max-width: 90rem; } td { white-space: nowrap; }"
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{STYLE}{wide}</style>",
        f"<h1>{name}</h1><p>{escape(caption(result))}. Rows: attacks; columns: defenses. An attack's success has its "
        "floor below it: how often the model that nobody attacked does the same under that defense.</p>",
        f"<div class='wide'>{image('Attacks by defenses', drawing)}</div>",
        *(f"<h2>{escape(title(metric))}</h2>{linked_table(result, metric)}" for metric in (result["metric"], SUCCESS)),
        stealth_table(result),
        reasons_list(result),
        f"<h2>Cost</h2><p>{escape(saved)}</p>",
        f"<h2>Configuration</h2><pre>{escape(config)}</pre>",
    ]
    return "\n".join(parts) + "</html>\n"


def linked_table(result: Mapping[str, Any], metric: str) -> str:
    """The numbers of a heat map; each cell leads to the folders of its runs."""
    cells, told, seeds = cells_of(result), reasons(result), len(result["seeds"])
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *result["defenses"]])
    lines = ""
    for row, attack in enumerate(result["attacks"]):
        lines += f"<tr><td>{escape(attack)}</td>"
        for column in range(len(result["defenses"])):
            cell = cells[row, column]
            text = escape(words(cell, metric, seeds, floor=metric == SUCCESS)).replace("\n", "<br>")
            links = [f"<a href='../{escape(path)}/'>{escape(seed)}</a>" for seed, path in cell["folders"].items()]
            parts = [text, f"[{told.index(reason(cell)) + 1}]" if reason(cell) else "", " ".join(links)]
            lines += f"<td>{'<br>'.join(part for part in parts if part)}</td>"
        lines += "</tr>"
    return f"<table><tr>{head}</tr>{lines}</table><p>The links lead to the run of each seed.</p>"


def stealth_table(result: Mapping[str, Any]) -> str:
    """How well attacks hide, what they find out, and for how long backdoors live: the other numbers of the cells."""
    known = dict.fromkeys(key for cell in result["cells"] for key in cell["mean"])
    keys = [key for key in known if key not in (result["metric"], SUCCESS, FLOOR)]
    rows = [
        [cell["attack"], cell["defense"], *(words(cell, key, len(result["seeds"])) for key in keys)]
        for cell in result["cells"]
        if any(cell["mean"].get(key) is not None for key in keys)
    ]
    heads = [f"{key} (%)" if key in SHARES else key for key in keys]
    title = "How well it hides, and what it finds out" if any(key.startswith(LEAKAGE) for key in keys) else HIDES
    return f"<h2>{title}</h2>{html_table(['attack', 'defense', *heads], rows)}" if rows else ""


def reasons_list(result: Mapping[str, Any]) -> str:
    """Why cells are empty."""
    lines = "".join(f"<p>[{i}] {escape(text)}</p>" for i, text in enumerate(reasons(result), 1))
    return f"<h2>Cells without numbers</h2>{lines}" if lines else ""


def matrix_tables(result: Mapping[str, Any]) -> list[Table]:
    """The same numbers for the terminal, without the rows that have none."""
    cells, seeds, tables = cells_of(result), len(result["seeds"]), []
    for metric in (result["metric"], SUCCESS):
        table = Table(title=title(metric).partition(";")[0])
        table.add_column(no_wrap=True)
        for name in result["defenses"]:
            table.add_column(name, overflow="fold")
        for row, attack in enumerate(result["attacks"]):
            found = [cells[row, column] for column in range(len(result["defenses"]))]
            shown = [words(cell, metric, seeds) or reason(cell)[:6] for cell in found]
            if any(shown):
                table.add_row(attack, *shown)
        if table.row_count:
            tables.append(table)
    return tables
