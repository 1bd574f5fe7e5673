"""What trusted adapters look like: medians and deviations, made once and kept as JSON, to measure others against."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.measure import REST, Measured
from fedllm_sec.audit.peers import CONSISTENT
from fedllm_sec.audit.policy import Thresholds
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_json

Array = NDArray[np.float64]
VERSION = 1
PER_MODULE = ("norm", "top1", "rank", "kurtosis", "gauge")
LOGARITHMIC = ("norm", "kurtosis")
LEAST = {"norm": 0.02, "top1": 0.01, "rank": 0.05, "kurtosis": 0.02, "gauge": 0.02, "profile": 0.02}


@dataclass(frozen=True)
class Bank:
    """Of n trusted adapters.

    Attributes:
        n: how many.
        modules: by name, the median and the MAD of each measure.
        whole: by feature of a whole adapter, its median and MAD.
        sources: names and SHA-256 of what it was made from.
        is_update: whether they were measured minus a global adapter.
    """

    n: int
    modules: Mapping[str, Mapping[str, tuple[float, float]]]
    whole: Mapping[str, tuple[float, float]]
    sources: Sequence[Mapping[str, str]]
    is_update: bool

    @classmethod
    def of(cls, measured: Measured, sources: Sequence[Mapping[str, str]], *, is_update: bool) -> "Bank":
        """Measure trusted adapters against each other.

        Raises:
            InputError: if there are fewer than two.
        """
        n = len(measured.names)
        if n < 2:
            raise InputError(f"a baseline needs at least two trusted adapters of one layout, got {n}")
        tables = tables_of(measured)
        modules = {
            module: {key: spread(table[:, column]) for key, table in tables.items()}
            for column, module in enumerate(measured.modules)
            if module != REST
        }
        rows = []
        for row in range(n):  # each against the others: against itself it would look too well
            rest = [other for other in range(n) if other != row]
            centres = {key: np.nanmedian(table[rest], axis=0) for key, table in tables.items()}
            rows.append(features(tables, row, centres["norm"]))
        whole = {key: spread(np.array([each[key] for each in rows])) for key in rows[0]}
        return cls(n, modules, whole, list(sources), is_update)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        fields = {"schema_version": VERSION, "n": self.n, "is_update": self.is_update, "sources": list(self.sources)}
        modules = {name: {key: as_list(pair) for key, pair in each.items()} for name, each in self.modules.items()}
        whole = {key: as_list(pair) for key, pair in self.whole.items()}
        write_json(path, {**fields, "whole": whole, "modules": modules})

    @classmethod
    def read(cls, path: Path) -> "Bank":
        """Read one.

        Raises:
            InputError: if it is none.
        """
        found = read_json(path)
        try:
            if found["schema_version"] != VERSION:
                raise InputError(f"{path}: is a baseline of version {found['schema_version']}, expected {VERSION}")
            if int(found["n"]) < 2 or not all(isinstance(each, dict) for each in found["sources"]):
                raise ValueError("n and sources say what it was made from")
            modules = {name: pairs_of(each) for name, each in found["modules"].items()}
            return cls(int(found["n"]), modules, pairs_of(found["whole"]), found["sources"], bool(found["is_update"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is no baseline of ours ({type(error).__name__}: {error})") from None

    def z(self, measured: Measured, row: int) -> dict[str, float]:
        """Robust z-scores of an adapter's features, by feature; those that neither side knows are left out."""
        centres = np.array([self.centre(module) for module in measured.modules])
        found = features(tables_of(measured), row, centres)
        return {
            key: abs(found[key] - middle) / max(CONSISTENT * deviation, LEAST[key])
            for key, (middle, deviation) in self.whole.items()
            if np.isfinite(found.get(key, np.nan)) and np.isfinite(middle)
        }

    def centre(self, module: str) -> float:
        """The median log norm of a module; that of the one whose name ends alike where prefixes differ."""
        alike = (m for m in self.modules if m == module or m.endswith(f".{module}") or module.endswith(f".{m}"))
        known = next(alike, None)
        return self.modules[known]["norm"][0] if known else float("nan")


def pairs_of(fields: Mapping[str, Sequence[Any]]) -> dict[str, tuple[float, float]]:
    """Medians and deviations; JSON has no NaN, so that they are null there."""
    return {key: (number(pair[0]), number(pair[1])) for key, pair in fields.items()}


def number(value: Any) -> float:
    """A number; null is NaN."""
    known = float("nan") if value is None else float(value)
    if value is not None and not np.isfinite(known):
        raise ValueError(f"{value} is no number")
    return known


def spread(values: Array) -> tuple[float, float]:
    """The median and the median absolute deviation; NaN (written as null) where nothing is known."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    middle = float(np.median(known))
    return middle, float(np.median(np.abs(known - middle)))


def tables_of(measured: Measured) -> dict[str, Array]:
    """(n, m) of each measure, on the scale on which deviations are even."""
    with np.errstate(divide="ignore", invalid="ignore"):
        known = {key: measured.measures[key] for key in PER_MODULE}
        tables = {key: np.log10(v) if key in LOGARITHMIC else v for key, v in known.items()}
    return {key: np.where(np.isfinite(table), table, np.nan) for key, table in tables.items()}


def features(tables: Mapping[str, Array], row: int, centres: Array) -> dict[str, float]:
    """One adapter as a few numbers.

    `norm`: log10 of its length; `profile`: how unevenly it is spread over the modules, beside the trusted (the standard
    deviation of its log norms less their medians); the others: medians over its modules.
    """
    found = {key: float(np.nanmedian(table[row])) for key, table in tables.items() if np.isfinite(table[row]).any()}
    squares = 10.0 ** (2 * tables["norm"][row])
    total = float(np.nansum(squares))
    if total > 0:
        found["norm"] = float(np.log10(total) / 2)
    else:
        found.pop("norm", None)
    apart = tables["norm"][row] - centres
    if np.isfinite(apart).sum() >= 2:
        found["profile"] = float(np.nanstd(apart))
    return found


def unlike_trusted(bank: Bank, measured: Measured, row: int, thresholds: Thresholds) -> Iterator[Fault]:
    """An adapter unlike the trusted ones: one finding, for the feature that says so most clearly."""
    if bank.n < thresholds.least_group:
        return
    z = bank.z(measured, row)
    past = sorted((key for key in z if z[key] > thresholds.z), key=lambda key: -z[key])
    if past:
        others = ", ".join(f"{key} {z[key]:.1f}" for key in past[1:])
        also = f"; so say also: {others}" if others else ""
        text = f"has another {past[0]} than the {bank.n} trusted: robust z-score {z[past[0]]:.1f}{also}"
        yield Fault("W007", text, None, z[past[0]], thresholds.z)


def as_list(pair: tuple[float, float]) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if np.isnan(value) else value for value in pair]
