"""Read what runs left, and put those together that differ by their seed alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedllm_sec.updates.errors import InputError

ACCURACIES = ("accuracy", "client_accuracy")
SUCCESS = "attack_success"
FLOOR = f"{SUCCESS}/"  # begins the name of what an unattacked arm's model does of an attacked arm's will
LEAKAGE = "leakage/"  # begins the name of what is right of that which an attack reconstructed
LEAKED = (  # those from 0 to 1
    *("matched", "label_accuracy", "label_recall", "label_precision", "label_exact"),
    *("token_recall", "token_precision", "rouge_1", "rouge_2", "rouge_l", "exact", "prefix"),
)
SHARES = (*ACCURACIES, "macro_f1", SUCCESS, *(LEAKAGE + name for name in LEAKED))  # metrics from 0 to 1


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

    @property
    def leaked(self) -> dict[str, Any]:
        """What the last round in which somebody looked says of what was found: who looks need not look to the end."""
        known = (row for row in reversed(self.rounds) if any(key.startswith(LEAKAGE) for key in row))
        return {key: value for key, value in next(known, {}).items() if key.startswith(LEAKAGE)}

    @property
    def measured(self) -> set[str]:
        """The metrics that any of its rounds has."""
        return set().union(*self.rounds)

    @property
    def floors(self) -> dict[str, str]:
        """The metrics that are floors of attacks, and an arm that has the attack."""
        return {metric: metric.removeprefix(FLOOR) for metric in sorted(self.measured) if metric.startswith(FLOOR)}


class Run(NamedTuple):
    """A run's folder, read; `tree` is its configuration as data, `config` as text."""

    folder: Path
    config: str
    tree: dict[str, Any]
    curves: list[Curve]

    @property
    def experiment(self) -> dict[str, Any]:
        """Its configuration but for what tells the runs of one experiment apart."""
        return {key: value for key, value in self.tree.items() if key not in ("seed", "out")}

    @property
    def seed(self) -> Any:
        """From which it drew."""
        return self.tree.get("seed")

    def curve(self, arm: str) -> Curve | None:
        """One arm's, or None if no round of it is finished."""
        return next((curve for curve in self.curves if curve.name == arm), None)


class Group(NamedTuple):
    """The runs of one experiment, each from another seed; often just one."""

    runs: list[Run]

    @property
    def name(self) -> str:
        """The first run's folder, and how many seeds there are if more than one."""
        first = self.runs[0].folder.name
        return first if len(self.runs) == 1 else f"{first} ({len(self.runs)} seeds)"

    @property
    def arms(self) -> list[str]:
        """The arms with at least one round in any run, in the order of the configuration."""
        return [arm for arm in self.runs[0].tree["arms"] if any(run.curve(arm) for run in self.runs)]

    def curves(self, arm: str) -> list[Curve]:
        """One arm's curve in every run that has begun it."""
        return [curve for run in self.runs if (curve := run.curve(arm))]

    def values(self, arm: str, metric: str) -> tuple[list[int], list[list[float]]]:
        """Rounds, and the values of a metric in each: those rounds in which every curve of the arm has one."""
        measured = [dict(zip(*curve.values(metric), strict=True)) for curve in self.curves(arm)]
        rounds = sorted(set.intersection(*(set(values) for values in measured)))
        return rounds, [[values[i] for values in measured] for i in rounds]


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
        tree = yaml.safe_load(text)
        files = {arm: folder / arm / "metrics.jsonl" for arm in tree["arms"]}
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
    return Run(folder, text, tree, curves)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Put runs together whose configurations differ in `seed` and `out` alone; two of the same seed stay apart."""
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            same = group.runs[0].experiment == run.experiment
            if same and all(other.seed != run.seed for other in group.runs):
                group.runs.append(run)
                break
        else:
            groups.append(Group([run]))
    return groups


def label(owner: Run | Group, arm: str, alone: bool) -> str:
    """The arm's name, with its run's or group's where several are shown, and how many seeds it has if not all."""
    name = arm
    if isinstance(owner, Group) and (begun := len(owner.curves(arm))) < len(owner.runs):
        name += f" ({begun} of {len(owner.runs)} seeds)"
    if alone:
        return name
    return f"{owner.folder.name if isinstance(owner, Run) else owner.name}: {name}"
