"""Adapters beside each other: outliers, copies, colluders, and the others' mean reversed; all from one Gram matrix."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.policy import Thresholds
from fedllm_sec.defenses.geometry.gram import cosines, distances_to, squared_distances, weiszfeld
from fedllm_sec.defenses.geometry.select import krum_scores

Array = NDArray[np.float64]

CONSISTENT = 1.4826  # a median absolute deviation times this is the standard deviation of a normal distribution
LEAST = {
    "frame": 0.02,
    "norm": 0.02,
    "cosine": 0.01,
    "median": 0.01,
    "krum": 0.02,
    "signs": 0.005,
    "turn": 0.02,
    "pair": 0.02,
}
LOW_IS_BAD = ("cosine", "signs", "turn", "frame")
RULE_OF = {
    "norm": "P003",
    "cosine": "P001",
    "median": "P005",
    "krum": "P006",
    "signs": "P007",
    "turn": "P009",
    "frame": "W004",
}
SAYS = {
    "norm": "is {:.3g} long (log10 {:.2f})",
    "cosine": "has the cosine {:.2f} with the mean direction of the others",
    "median": "is {:.2f} of its length away from the others' geometric median",
    "krum": "has the Krum score {:.2f} among directions",
    "signs": "moves in the majority's direction in {:.0%} of the coordinates",
    "turn": "has the cosine {:.2f} with its own earlier updates",
    "frame": "has factors A with the cosine {:.2f} with the global adapter's, unlike the others'",
}
NAMED = 4  # other adapters that a message names


def scores_of(gram: Array, agreement: Array, frame: Array, turns: Array | None = None) -> dict[str, Array]:
    """How each adapter lies among the others; directions are compared, and lengths by themselves.

    Args:
        gram: (n, n) inner products of whole updates.
        agreement: (n,) shares of coordinates that moved with the majority; NaN where unknown.
        frame: (n,) mean cosines of the factors A with the global adapter's; NaN where unknown.
        turns: (n,) cosines with the adapter's own earlier updates; NaN where unknown.

    Returns:
        By score, (n,): `norm` log10 of the length, `cosine` with the mean of the others' directions, `median` distance
        from the geometric median of directions, `krum` the mean squared distance to the nearest half of the directions,
        `signs`, `frame`, `turn`. NaN for an update of length zero.
    """
    lengths = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    live = np.flatnonzero(lengths > 0)
    n = len(gram)
    found = {name: np.full(n, np.nan) for name in ("norm", "cosine", "median", "krum")}
    found["frame"] = np.where(lengths > 0, frame, np.nan)
    found["signs"] = np.where(lengths > 0, agreement, np.nan)
    found["turn"] = turns if turns is not None else np.full(n, np.nan)
    if not len(live):
        return found
    found["norm"][live] = np.log10(lengths[live])
    if len(live) < 3:
        return found
    unit = cosines(torch.from_numpy(gram[np.ix_(live, live)]))
    sums = unit.sum(dim=1) - unit.diagonal()
    squares = unit.sum() - 2 * unit.sum(dim=1) + unit.diagonal()
    found["cosine"][live] = (sums / squares.clamp(min=1e-12).sqrt()).clamp(-1, 1).numpy()
    alike = torch.full((len(live),), 1 / len(live), dtype=torch.float64)
    found["median"][live] = distances_to(unit, weiszfeld(unit, alike, 1e-6, 1000)[0]).numpy()
    neighbours = max(len(live) // 2, 1)
    found["krum"][live] = (krum_scores(squared_distances(unit), neighbours) / neighbours).numpy()
    return found


def robust_z(values: Array, least: float) -> Array:
    """Distances from the median in units of 1.4826 MAD, of which there is at least `least`."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.full_like(values, np.nan)
    middle = np.median(known)
    spread = max(CONSISTENT * float(np.median(np.abs(known - middle))), least)
    z: Array = (values - middle) / spread
    return z


def z_of(scores: Mapping[str, Array], least_group: int) -> dict[str, Array]:
    """Robust z-scores, of which large ones are bad; none of scores that too few adapters have."""
    found = {}
    for name, values in scores.items():
        if np.isfinite(values).sum() >= least_group:
            z = robust_z(values, LEAST[name])
            found[name] = np.abs(z) if name == "norm" else -z if name in LOW_IS_BAD else z
    return found


def outliers(scores: Mapping[str, Array], z: Mapping[str, Array], row: int, thresholds: Thresholds) -> Iterator[Fault]:
    """An adapter unlike the others: one finding, for the score that says so most clearly."""
    known = {name: float(values[row]) for name, values in z.items() if np.isfinite(values[row])}
    past = sorted((name for name, value in known.items() if value > thresholds.z), key=lambda name: -known[name])
    if not past:
        return
    first = past[0]
    value = float(scores[first][row])
    says = SAYS[first].format(10**value, value) if first == "norm" else SAYS[first].format(value)
    others = ", ".join(f"{name} {known[name]:.1f}" for name in past[1:])
    also = f"; so say also: {others}" if others else ""
    yield Fault(RULE_OF[first], f"{says}: robust z-score {known[first]:.1f}{also}", None, known[first], thresholds.z)


def copies(gram: Array, names: tuple[str, ...], thresholds: Thresholds) -> dict[int, Fault]:
    """Adapters that are the same as another one, but for a little noise."""
    squares = squared_distances(torch.from_numpy(gram)).numpy()
    lengths = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    longest = np.maximum(lengths[:, None], lengths[None, :])
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where(longest > 0, np.sqrt(squares) / longest, np.inf)
        shortest = np.minimum(lengths[:, None], lengths[None, :])
        turned = np.sqrt(np.clip(2 - 2 * gram / (longest * shortest), 0, None))  # of a copy at another length
        apart = np.minimum(apart, np.where(shortest > 0, turned, np.inf))
    np.fill_diagonal(apart, np.inf)
    found = {}
    for row, distances in enumerate(apart):
        same = np.flatnonzero(distances < thresholds.copy_distance)
        if len(same):
            nearest = float(distances.min())
            how = f"but for {nearest:.2g} of its length" if nearest > 1e-6 else "exactly"
            text = f"is the update of {named(names, same)}, {how}"
            found[row] = Fault("P002", text, None, nearest, thresholds.copy_distance)
    return found


def colluders(gram: Array, names: tuple[str, ...], thresholds: Thresholds, but: set[int]) -> dict[int, Fault]:
    """Adapters that are far closer to some others than two adapters usually are; without those in `but`.

    A few that collude make few of all pairs: their cosines stand out of those of all pairs.
    """
    rows = [row for row in range(len(gram)) if row not in but and gram[row, row] > 0]
    if len(rows) < thresholds.least_group:
        return {}
    unit = cosines(torch.from_numpy(gram[np.ix_(rows, rows)])).numpy()
    upper = np.triu_indices(len(rows), 1)
    angles = np.arccos(np.clip(unit, -1, 1))  # cosines near one are crowded
    z = np.zeros_like(angles)
    z[upper] = -robust_z(angles[upper], LEAST["pair"])
    z += z.T
    found = {}
    for i, row in enumerate(rows):
        close = np.flatnonzero(z[i] > thresholds.pair_z)
        if 0 < len(close) < len(rows) / 2:
            best = int(z[i].argmax())
            who = named(names, np.array([rows[j] for j in close]))
            text = f"has the cosine {unit[i, best]:.2f} with {who}: robust z-score {z[i, best]:.1f} among all pairs"
            found[row] = Fault("P004", text, None, float(z[i, best]), thresholds.pair_z)
    return found


def reversed_mean(scores: Mapping[str, Array], row: int, thresholds: Thresholds) -> Fault | None:
    """An adapter that is the others' mean, reversed."""
    cosine = float(scores["cosine"][row])
    if not cosine < thresholds.minus:
        return None
    return Fault(
        "P008", f"points against the others: cosine {cosine:.3f} with their mean", None, cosine, thresholds.minus
    )


def named(names: tuple[str, ...], rows: NDArray[np.int64]) -> str:
    """A few of them."""
    few = ", ".join(names[row] for row in rows[:NAMED])
    return few + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
