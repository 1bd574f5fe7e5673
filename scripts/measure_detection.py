"""How often `fedllm-sec audit` finds the malicious clients of real federations, and how often it blames honest ones.

    fedllm-sec run configs/audit_detection.yaml ... seed=0 out=runs/detection/iid_0      # and others, see there
    python scripts/measure_detection.py runs/detection/* --json detection.json --figure detection.png

A run's arms are a benign one and one for each attack. What the server received in the attacked round is audited as a
server would, beside the global adapter that the clients began with: of each client what the adversary sent in its
place, else what it sent after it trained again, else what it trained. Runs with other partitions of the data are other
columns of the table; runs that differ in their seed alone are pooled.

- detected: malicious clients with a finding that fails, and how many of them each rule fired on.
- false alarms: honest clients of the same arms with a finding that fails.
- ROC: clients by their largest z-score beside the others, whatever rule it belongs to. Findings that are no z-scores
  (copies, malformed files) are not in it; who could not be compared (an update of zero, a malformed one) is above all.

A malicious client that sent the bytes that it sends when nobody attacks is idle, and does not count. Most attacks on
updates send the same from all malicious clients: a search for copies finds them, whatever they send. With --alone one
client attacks at a time, and all others send what they send when nobody attacks.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from rich.progress import track

from fedllm_sec import InputError
from fedllm_sec.audit import audit_adapters
from fedllm_sec.audit.findings import Audit
from fedllm_sec.audit.policy import Policy, read_policy
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.terminal import console
from fedllm_sec.updates.files import write_json
from fedllm_sec.updates.sources import adapter_file

BENIGN = "benign"
UNSEEN = 0.1  # detected less often than this, an attack passes unseen
FALSE_ALARMS = (0.01, 0.05)  # at which the ROC is read
ABOVE_ALL = float(np.finfo(np.float64).max)
COLUMNS = 6  # of the figure
STROKES = {"#0072B2": "-", "#D55E00": "--", "#009E73": "-.", "#CC79A7": ":"}  # curves on one another stay visible


class Client(NamedTuple):
    """One client of an audited arm.

    Attributes:
        malicious: whether it is the adversary's, and acted.
        rules: the ids of the findings that fail; none: it passes.
        z: its largest z-score; `score`: which one that is.
    """

    malicious: bool
    rules: tuple[str, ...]
    z: float
    score: str


class Arm(NamedTuple):
    """The clients of an arm that count, and how many malicious ones do not."""

    clients: tuple[Client, ...]
    idle: int


@dataclass(frozen=True)
class Cell:
    """What was measured of one attack under one partition, over all seeds.

    Attributes:
        malicious: clients that acted; `idle`: those that did not; `detected`: of those that did.
        honest: clients; `false_alarms`: of those.
        rules: on how many malicious clients each fired; `alarms`: on how many honest ones.
        scores: which z-score was a malicious client's largest, how often.
        auc: of the ROC; None where nobody is malicious.
        at: the detection rate at each false alarm rate.
        curve: the ROC's (false alarm rates, detection rates).
    """

    malicious: int
    idle: int
    detected: int
    honest: int
    false_alarms: int
    rules: Mapping[str, int]
    alarms: Mapping[str, int]
    scores: Mapping[str, int]
    auc: float | None
    at: Mapping[str, float]
    curve: tuple[list[float], list[float]]


Cells = Mapping[str, Mapping[str, Cell]]  # by attack, by partition


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    policy: Annotated[Path | None, typer.Option(help="An audit's policy; default: all defaults.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="One attacker at a time; needs the benign arm.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ROC curves.")] = None,
) -> None:
    """Audit the attacked round of every arm, and print a Markdown table."""
    try:
        cells = measured(runs, read_policy(policy), alone)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    if json is not None:
        write_json(json, {attack: {name: asdict(cell) for name, cell in row.items()} for attack, row in cells.items()})
    if figure is not None:
        draw(cells, figure)
    typer.echo(markdown(cells))


def measured(runs: Sequence[Path], policy: Policy, alone: bool) -> Cells:
    """Every arm of every run, pooled over seeds."""
    found: dict[tuple[str, str], list[Arm]] = {}
    for run in runs:
        arms = sorted(path.parent.name for path in run.glob("*/metrics.jsonl"))
        if not arms:
            raise InputError(f"{run}: holds no run")
        for arm in track(arms, f"auditing {run.name}", console=console, transient=True):
            found.setdefault((arm, partition(run)), []).append(audited(run, arm, policy, alone))
    names = dict.fromkeys(arm for run in runs for arm in configuration(run)["arms"])
    cells = {arm: {part: pooled(arms) for (each, part), arms in found.items() if each == arm} for arm in names}
    return {arm: row for arm, row in cells.items() if row}


def configuration(run: Path) -> dict[str, Any]:
    """A run's, as it was resolved."""
    tree: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return tree


def partition(run: Path) -> str:
    """How a run's data is split, for people."""
    settings = configuration(run)["data"]["partition"]
    return settings["kind"] if settings["kind"] == "iid" else f"{settings['kind']}({settings['alpha']:g})"


def audited(run: Path, arm: str, policy: Policy, alone: bool) -> Arm:
    """Audit what the server received in an arm's last round with an attack (of a benign arm: in its last round)."""
    folder, benign = ArmFolder(run / arm), ArmFolder(run / BENIGN)
    rounds = range(1, configuration(run)["federation"]["rounds"] + 1)
    told = {each: metrics["malicious"] for each in rounds if (metrics := folder.metrics(each)) is not None}
    if not told:
        raise InputError(f"{folder.path}: has no round that is whole")
    index = max((each for each in told if told[each]), default=max(told))
    received, honestly = received_in(folder, index), received_in(benign, index) if benign.path.is_dir() else {}
    if alone and not honestly:
        raise InputError(f"{run}: has no arm {BENIGN!r}, which --alone takes the others from")
    acting = [name for name in told[index] if name not in honestly or not same(received[name], honestly[name])]
    clients: list[Client] = []
    for attackers in [[name] for name in acting] if alone and acting else [acting]:
        paths = {name: honestly[name] if alone and name not in attackers else received[name] for name in received}
        start = folder.global_model(index - 1)
        audit = audit_adapters(list(paths.values()), names=list(paths), reference=start, policy=policy)
        rest = [name for name in paths if name in acting or name not in told[index]]
        clients += [client(audit, name, name in attackers) for name in rest]
    return Arm(tuple(clients), len(told[index]) - len(acting))


def received_in(folder: ArmFolder, index: int) -> dict[str, Path]:
    """What the server received of each client in a round, by the client's name."""
    sent = {path.name: path for path in sorted(folder.round(index).glob("client_*")) if path.is_dir()}
    again = {path.name: path for path in folder.again(index).glob("client_*") if path.is_dir()}
    poisoned = {name: folder.poisoned(index, int(name.rpartition("_")[2])) for name in sent}
    return {**sent, **again, **{name: path for name, path in poisoned.items() if path.is_dir()}}


def same(one: Path, other: Path) -> bool:
    """Whether two adapters are the same to the byte."""
    return adapter_file(one).read_bytes() == adapter_file(other).read_bytes()


def client(audit: Audit, name: str, malicious: bool) -> Client:
    """What an audit says of one client."""
    rules = tuple(sorted({finding.rule.id for finding in audit.failing if finding.adapter == name}))
    return Client(malicious, rules, *largest(audit, name))


def largest(audit: Audit, name: str) -> tuple[float, str]:
    """A client's largest z-score and what it is called; above all others where it has none."""
    statistics = audit.statistics
    if statistics is not None and name in statistics.adapters:
        row = statistics.adapters.index(name)
        known = {score: float(values[row]) for score, values in statistics.z.items() if not np.isnan(values[row])}
        if known:
            score = max(known, key=known.__getitem__)
            return min(known[score], ABOVE_ALL), score
    return ABOVE_ALL, "not compared"


def pooled(arms: Sequence[Arm]) -> Cell:
    """One cell of the table."""
    clients = [each for arm in arms for each in arm.clients]
    bad = [each for each in clients if each.malicious]
    good = [each for each in clients if not each.malicious]
    auc, rates, hits = roc(clients) if bad and good else (None, np.zeros(1), np.zeros(1))
    return Cell(
        malicious=len(bad),
        idle=sum(arm.idle for arm in arms),
        detected=sum(bool(each.rules) for each in bad),
        honest=len(good),
        false_alarms=sum(bool(each.rules) for each in good),
        rules=counted(bad),
        alarms=counted(good),
        scores=dict(Counter(each.score for each in bad).most_common()),
        auc=auc,
        at={f"{limit:g}": float(hits[rates <= limit].max()) for limit in FALSE_ALARMS} if auc is not None else {},
        curve=(rates.tolist(), hits.tolist()),
    )


def counted(clients: Sequence[Client]) -> dict[str, int]:
    """On how many clients each rule fired, the commonest first."""
    return dict(Counter(rule for each in clients for rule in each.rules).most_common())


def roc(clients: Sequence[Client]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """The area under the curve, its false alarm rates and its detection rates."""
    from sklearn.metrics import auc, roc_curve

    rates, hits, _ = roc_curve([each.malicious for each in clients], [each.z for each in clients])
    return float(auc(rates, hits)), rates, hits


def markdown(cells: Cells) -> str:
    """One line for each arm, three columns for each partition."""
    parts = list(dict.fromkeys(part for row in cells.values() for part in row))
    heads = [f"{part}: {head}" for part in parts for head in ("detected, false alarms", "ROC", "rules that fired")]
    lines = [["attack", *heads], ["---"] * (1 + len(heads))]
    for arm, row in cells.items():
        lines.append([f"`{arm}`", *(text for part in parts for text in told(row.get(part)))])
    note = "ROC: area under the curve; detection at " + " and at ".join(f"{rate:.0%}" for rate in FALSE_ALARMS)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note} false alarms.\n"


def told(cell: Cell | None) -> tuple[str, str, str]:
    """A cell's three texts; of a benign arm the rules are those that blamed honest clients."""
    if cell is None:
        return "-", "-", "-"
    alarms = share(cell.false_alarms, cell.honest)
    idle = f" ({cell.idle} idle)" if cell.idle else ""
    if cell.auc is None:
        return f"-{idle}, {alarms}", "-", listed(cell.alarms) or "none"
    rules = ("**passes unseen** " if cell.detected < UNSEEN * cell.malicious else "") + listed(cell.rules)
    at = ", ".join(f"{rate:.0%}" for rate in cell.at.values())
    return f"{share(cell.detected, cell.malicious)}{idle}, {alarms}", f"{cell.auc:.2f}; {at}", rules.rstrip()


def share(part: int, whole: int) -> str:
    """`5/6 (83 %)`."""
    return f"{part}/{whole} ({part / whole:.0%})" if whole else "-"


def listed(rules: Mapping[str, int]) -> str:
    """`P003 4, P001 1`: on how many clients each rule fired."""
    return ", ".join(f"{rule} {count}" for rule, count in rules.items())


def draw(cells: Cells, path: Path) -> None:
    """A small ROC for each attack, a line for each partition."""
    from matplotlib.figure import Figure

    attacks = {arm: row for arm, row in cells.items() if any(cell.auc is not None for cell in row.values())}
    parts = list(dict.fromkeys(part for row in cells.values() for part in row))
    rows = max(math.ceil(len(attacks) / COLUMNS), 1)
    figure = Figure(figsize=(2.1 * COLUMNS, 2.15 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[len(attacks) :]:  # places that are left over
        axes.set_visible(False)
    for axes, (arm, row) in zip(grid, attacks.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle=":")
        for part, (colour, stroke) in zip(parts, STROKES.items(), strict=False):
            if part in row and row[part].auc is not None:
                axes.plot(*row[part].curve, color=colour, linestyle=stroke, linewidth=1.6, label=part)
        axes.set_title(arm, fontsize=9)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        aucs = "\n".join(f"{row[part].auc:.2f}" for part in parts if part in row and row[part].auc is not None)
        axes.text(0.97, 0.04, f"AUC\n{aucs}", fontsize=8, ha="right", va="bottom", backgroundcolor="#ffffffcc")
        axes.tick_params(labelsize=8)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(parts), frameon=False)
    figure.supxlabel("honest clients above the threshold", fontsize=10)
    figure.supylabel("malicious clients above the threshold", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
