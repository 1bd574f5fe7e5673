"""Read what a run left."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedllm_sec.updates.errors import InputError


class Curve(NamedTuple):
    """An arm: its name and the metrics of its rounds, in order."""

    name: str
    rounds: list[dict[str, Any]]

    def values(self, metric: str) -> tuple[list[int], list[float]]:
        """Rounds and values of a metric, where it was measured and finite."""
        pairs = [(row["round"], row[metric]) for row in self.rounds if row.get(metric) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last round."""
        return self.rounds[-1]


class Run(NamedTuple):
    """A run's folder, read."""

    folder: Path
    config: str
    curves: list[Curve]


def read_run(folder: Path) -> Run:
    """Read a run; arms come in the order of its configuration.

    Raises:
        InputError: if the folder holds no run, or none of its rounds is whole.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: holds no run (no config.yaml)")
    try:
        text = path.read_text(encoding="utf-8")
        files = {arm: folder / arm / "metrics.jsonl" for arm in yaml.safe_load(text)["arms"]}
        rounds = {
            arm: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for arm, file in files.items()
            if file.is_file()
        }
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: is not a run of ours, or was damaged ({type(error).__name__}: {error})") from None
    curves = [Curve(arm, rows) for arm, rows in rounds.items() if rows]
    if not curves:
        raise InputError(f"{folder}: no round of this run is finished yet")
    return Run(folder, text, curves)


def label(run: Run, curve: Curve, alone: bool) -> str:
    """The arm's name, with its run's where several runs are shown."""
    return curve.name if alone else f"{run.folder.name}: {curve.name}"
