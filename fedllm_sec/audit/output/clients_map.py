"""Adapters as points of a plane: classical scaling of the distances between their whole updates; n adapters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.audit.findings import Statistics
from fedllm_sec.audit.output.words import plotted

Matrix = NDArray[np.float64]
FAILED, PASSED = "#D55E00", "#0072B2"
SIZE = 6.2  # inches
POINTS = 72  # to an inch: unlike pixels, the same in every format
LETTER, LINE = 0.064, 0.12  # inches of a letter's width and height at the labels' size
RINGS = (0.09, 0.2, 0.36)  # inches from a point at which its name may stand


class Plane(NamedTuple):
    """Where adapters lie: which of them, (k, 2) coordinates, and the share of squared distance along each axis."""

    rows: tuple[int, ...]
    points: Matrix
    shares: tuple[float, float]


def plane(gram: Matrix) -> Plane:
    """Classical multidimensional scaling of a Gram matrix; adapters with values that are not finite are left out.

    It is exact where the updates lie in a plane; of others it keeps the two directions of the most squared distance.
    """
    gram = np.asarray(gram, dtype=np.float64)
    kept = np.flatnonzero(np.isfinite(np.diagonal(gram)))
    while len(kept) and not np.isfinite(part := gram[np.ix_(kept, kept)]).all():
        kept = np.delete(kept, np.argmin(np.isfinite(part).sum(axis=1)))
    if not len(kept):
        return Plane((), np.zeros((0, 2)), (0.0, 0.0))
    inner = gram[np.ix_(kept, kept)]
    scale = float(np.abs(inner).max()) or 1.0  # squares of huge updates overflow
    inner = inner / scale
    lengths = np.diagonal(inner)
    squared = np.clip(lengths[:, None] + lengths[None, :] - inner - inner.T, 0, None)
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    values, vectors = np.linalg.eigh(-(centred + centred.T) / 4)
    values = np.clip(values, 0, None)
    values[values < 1e-12 * lengths.max(initial=0.0)] = 0.0  # what rounding leaves of equal updates
    total, two = float(values.sum()), np.zeros((len(kept), 2))
    for axis in range(min(2, len(kept))):
        vector = vectors[:, -1 - axis]
        sign = np.sign(vector[np.argmax(np.abs(vector))])  # else it is the library's choice
        two[:, axis] = sign * np.sqrt(values[-1 - axis] * scale) * vector
    share = [float(values[-1 - axis]) / total if total and axis < len(kept) else 0.0 for axis in (0, 1)]
    return Plane(tuple(kept.tolist()), two, (share[0], share[1]))


def clients_map(known: Statistics, failed: Sequence[bool]) -> Any | None:
    """The figure, and where some are far out, beside it the others from near; None for fewer than two adapters."""
    from matplotlib.figure import Figure

    found = plane(known.gram)
    if len(found.rows) < 2:
        return None
    near = crowd(found.points)
    views = [np.ones(len(found.rows), dtype=bool), *([near] if near is not None else [])]
    broken = np.array([failed[row] for row in found.rows], dtype=bool)
    texts = [plotted(known.adapters[row], 22) for row in found.rows]
    width = SIZE * len(views)
    figure = Figure(figsize=(width, SIZE))
    for i, view in enumerate(views):
        axes = figure.add_axes(((i * SIZE + 0.75) / width, 0.1, (SIZE - 0.9) / width, 0.8))
        shown = np.flatnonzero(view)
        left_out = draw_view(axes, found, [texts[k] for k in shown], broken, shown)
        notes = ["all" if i == 0 else f"from near: the {len(shown)} in the middle"]
        notes += [f"{left_out} without a name, for want of room"] if left_out else []
        unseen = len(known.adapters) - len(found.rows)
        notes += [f"{unseen} not finite and not shown"] if unseen and i == 0 else []
        notes += [] if any(found.shares) else ["all updates are the same"]
        axes.set_title("; ".join(notes), fontsize=9)
    return figure


def crowd(points: Matrix) -> NDArray[np.bool_] | None:
    """Those that lie together where others lie so far out that their places cannot be told apart; else None."""
    apart = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    near = apart <= 4 * np.median(apart)
    return near if 2 < near.sum() < len(points) and apart[near].max() < 0.35 * apart.max() else None


def draw_view(axes: Any, found: Plane, texts: Sequence[str], broken: NDArray[np.bool_], shown: NDArray[np.intp]) -> int:
    """Draw some of the points with their names; return how many names do not fit."""
    points, fails = found.points[shown], broken[shown]
    for who, marker, colour, name in ((~fails, "o", PASSED, "fit"), (fails, "^", FAILED, "fails")):
        if who.any():
            style: dict[str, Any] = {"s": 44, "alpha": 0.8, "edgecolors": "white", "linewidths": 0.6, "label": name}
            axes.scatter(points[who, 0], points[who, 1], marker=marker, c=colour, **style)
    for axis, share, word in ((axes.xaxis, found.shares[0], "first"), (axes.yaxis, found.shares[1], "second")):
        axis.set_label_text(f"{word} axis ({share:.1%} of squared distance)")
    fit_limits(axes, points)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", ncols=2, fontsize=8)
    return write_names(axes, points, texts, fails)


def fit_limits(axes: Any, points: Matrix) -> None:
    """Both axes to one scale, for distances are to be compared, with room for names."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.5 * float((high - low).max()) or 1.0
    middle = (low + high) / 2
    axes.set_xlim(
        middle[0] - 1.3 * half * (SIZE - 0.9) / (0.8 * SIZE), middle[0] + 1.3 * half * (SIZE - 0.9) / (0.8 * SIZE)
    )
    axes.set_ylim(middle[1] - 1.3 * half, middle[1] + 1.3 * half)


def write_names(axes: Any, points: Matrix, texts: Sequence[str], first: NDArray[np.bool_]) -> int:
    """Write names beside points where no other name stands, the marked ones first; return how many do not fit."""
    dpi = axes.figure.dpi
    inches = axes.transData.transform(points) / dpi
    frame = axes.get_window_extent()
    window = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) / dpi
    taken = [np.array([x - 0.04, y - 0.04, x + 0.04, y + 0.04]) for x, y in inches]
    left_out = 0
    for i in np.argsort(~first, kind="stable"):
        box = free_box(inches[i], LETTER * len(texts[i]), taken, window)
        if box is None:
            left_out += 1
            continue
        taken.append(box)
        at = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        far = float(np.hypot(*(np.clip(inches[i], box[:2], box[2:]) - inches[i]))) > RINGS[0] + 0.02
        axes.annotate(
            texts[i],
            tuple(inches[i] * POINTS),
            xytext=(at[0] * POINTS, at[1] * POINTS),
            xycoords="figure points",
            textcoords="figure points",
            ha="center",
            va="center",
            fontsize=7,
            color=FAILED if first[i] else "0.2",
            arrowprops=line if far else None,
        )
    return left_out


def free_box(point: Matrix, width: float, taken: Sequence[Matrix], window: Matrix) -> Matrix | None:
    """The nearest free rectangle for a name beside a point, all in inches; None where there is none."""
    boxes = np.array(taken)
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    for ring in RINGS:
        for right, up in sides:
            x = point[0] + right * (ring + width / 2)
            y = point[1] + up * (ring + LINE / 2)
            box = np.array([x - width / 2, y - LINE / 2, x + width / 2, y + LINE / 2])
            inside = (box[:2] >= window[:2]).all() and (box[2:] <= window[2:]).all()
            clear = (box[:2] >= boxes[:, 2:]) | (box[2:] <= boxes[:, :2])
            if inside and clear.any(axis=1).all():
                return box
    return None
