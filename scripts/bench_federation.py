"""Measure a federation of small models beside Flower's and ByzFL's simulations: seconds of a round, and the same model.

    python scripts/bench_federation.py --peers-python PEERS/bin/python --json runs/federation.json

Model, data, split, batches and their order are the same for everybody; peers get the images normalised, in memory. A
round is the local training of all clients and the average, without a test; the first one is left out. Ours writes
every model and record to files, as in any run; the peers write none. With `--algorithm epoch` a client trains for one
epoch in a round, with `step` for one batch: the least work that a round can have, where what surrounds the training
shows most. `-sliced` peers fetch whole batches by an index, which is faster than what their tutorials do.

`--check` runs one round and compares every model with one that plain float64 training gives; the distance of plain
float32 training stands beside it, for training magnifies rounding. (Use few --examples: it is slow.)

The peers' environment is made once, outside the repository:

    python3.11 -m venv PEERS && PEERS/bin/pip install torch==2.13.0 numpy scipy 'flwr[simulation]==1.41.0'
    PEERS/bin/pip install --no-deps byzfl==0.0.11

Every system gets `--threads` cores: ours and ByzFL that many threads, Flower that many actors of one thread each.
"""

import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench.machine import commit, machine
from bench_peers.cases import CASES, SYSTEMS, Algorithm, System, Weights
from bench_peers.given import write
from bench_peers.launch import launch
from bench_peers.prepare import Prepared, distance, tree_of
from bench_peers.reference import naive
from rich.console import Console
from rich.table import Table

from fedllm_sec.terminal import console
from fedllm_sec.updates.files import write_json

Record = dict[str, Any]
DATA = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "mnist.npz"
USUAL = tuple(name for name in SYSTEMS if name != "ours-one-by-one")
WIDTH = 110  # of a table, in characters
app = typer.Typer(add_completion=False)


@app.command()
def bench(
    peers_python: Annotated[str, typer.Option(help="The interpreter of an environment with the peers.")],
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; repeat. Default: all.")] = None,
    system: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SYSTEMS)}; repeat.")] = None,
    algorithm: Annotated[Algorithm, typer.Option(help="What a client does in a round: an epoch or a step.")] = "epoch",
    weights: Annotated[Weights, typer.Option(help="In the average; ByzFL has equal ones only.")] = "equal",
    rounds: Annotated[int, typer.Option(min=2, help="The warm-up among them.")] = 4,
    check: Annotated[bool, typer.Option(help="Run one round, and compare models with a naive float64 one.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each system, in turns.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Cores for every system.")] = 2,
    examples: Annotated[int | None, typer.Option(help="At most so many, over all clients.")] = None,
    data: Annotated[Path, typer.Option(help="MNIST with both parts, as a file that `task: mnist` reads.")] = DATA,
    workdir: Annotated[Path | None, typer.Option(help="For what is given and for our run; deleted again.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a process is stopped.")] = 1800.0,
    json: Annotated[Path | None, typer.Option(help="Where every single timing goes.")] = None,
) -> None:
    """Measure, print, and keep."""
    cases = [CASES[name] for name in chosen(case, tuple(CASES), tuple(CASES))]
    systems = [SYSTEMS[name] for name in chosen(system, USUAL, tuple(SYSTEMS))]
    if shutil.which(peers_python) is None:
        raise typer.BadParameter(f"--peers-python: {peers_python} is no program; --help says how to make one")
    if weights == "samples" and any(each.module == "byzfl_rounds" for each in systems):
        raise typer.BadParameter("ByzFL weighs clients alike: choose other systems, or --weights equal")
    rounds = 1 if check else rounds
    page: Record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "machine": machine()}
    page |= {"algorithm": algorithm, "weights": weights, "rounds": rounds, "repeats": repeats, "threads": threads}
    page["runs"] = []
    for each in cases:
        prepared = Prepared(tree_of(each, algorithm, weights, data.resolve(), rounds, examples))
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            write(Path(folder), prepared.given)
            job = {"given": folder, "config": prepared.tree, "threads": threads}
            runs = [measured(who, job, peers_python, limit) for _ in range(repeats) for who in systems]
        judge(runs, prepared, naive_runs(prepared) if check else [])
        Console(width=WIDTH).print(table(each.name, runs))
        page["runs"] += [{"case": each.name, **run} for run in runs]
        if json:
            json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, page)


def measured(system: System, job: Record, python: str, limit: float) -> Record:
    """One process of a system."""
    with console.status(f"{job['config']['model']['name']}, {job['config']['federation']['clients']}: {system.name}"):
        return {"system": system.name, **launch(system, job, python, Path(job["given"]), limit)}


def naive_runs(prepared: Prepared) -> list[Record]:
    """What everybody is held to, and how far rounding alone takes one from it."""
    kinds = {"naive float64": torch.float64, "naive float32": torch.float32}
    return [{"system": name, "outcome": "ok", "final": naive(prepared.given, dtype)} for name, dtype in kinds.items()]


def chosen(asked: list[str] | None, usual: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names that were asked for."""
    if unknown := sorted(set(asked or ()) - set(known)):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(asked or usual)


def judge(runs: list[Record], prepared: Prepared, references: list[Record]) -> None:
    """Put the references first; then accuracies, and distances to the first model, in the place of the models."""
    runs[:0] = references
    finals = [run.pop("final", None) for run in runs]
    first = next((final for final in finals if final is not None), None)
    given = prepared.given
    work = {"steps_of_a_round": given.steps(given.facts["rounds"]), "examples_of_a_round": int(given.counts[-1].sum())}
    for run, final in zip(runs, finals, strict=True):
        run |= work
        if final is not None and first is not None:
            run |= {"accuracy": prepared.accuracy(final), "apart": distance(final, first, given.initial)}


def table(name: str, runs: list[Record]) -> Table:
    """A line for each system; models are compared with the first line's."""
    steps, seen = runs[0]["steps_of_a_round"], runs[0]["examples_of_a_round"]
    title = f"{name}: {steps:,.0f} gradient steps on {seen:,.0f} examples in a round"
    made = Table("system", "seconds of a round", "n", "x ours", "process", "accuracy", "apart", "relative", title=title)
    ours = timed(runs, "ours")
    for system in dict.fromkeys(run["system"] for run in runs):
        own = [run for run in runs if run["system"] == system]
        if failed := next((run["outcome"] for run in own if run["outcome"] != "ok"), None):
            made.add_row(system, failed)
            continue
        seconds = timed(runs, system)
        made.add_row(
            system,
            f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})" if seconds else "",
            str(len(seconds) or ""),
            f"{statistics.median(seconds) / statistics.median(ours):.2f}" if seconds and ours else "",
            f"{statistics.median(run['process_seconds'] for run in own):.1f} s" if "process_seconds" in own[0] else "",
            f"{own[0]['accuracy']:.4f}",
            f"{max(run['apart']['largest'] for run in own):.1e}",
            f"{max(run['apart']['relative'] for run in own):.1e}",
        )
    return made


def timed(runs: list[Record], system: str) -> list[float]:
    """Seconds of every round of a system but the first of each process."""
    return [second for run in runs if run["system"] == system for second in run.get("seconds", [])[1:]]


if __name__ == "__main__":
    app()
