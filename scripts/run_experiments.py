"""Run the papers' Experiments 1 to 7 at their laptop scale with several seeds, and collect what came of the claims.

    python scripts/run_experiments.py --cifar10 FOLDER --femnist FILE --shakespeare FILE --out runs/experiments

What is finished is not run again, and what was cut off goes on. Each process trains with one thread, which for models
of this size is faster than one process with two; the results depend on it (`training.threads=1`), not on how many
processes there are. OUT/claims.md has all tables, OUT/EXPERIMENT/report each experiment's figures.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from fedllm_sec.reports.claims import READING
from fedllm_sec.reports.page import report
from fedllm_sec.terminal import console
from fedllm_sec.updates.files import write_text

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = {
    "cifar10": (
        "exp01_attacks",
        "exp02_defenses",
        "exp03_defenses_under_attack",
        "exp04_iid",
        "exp05_hundred_clients",
        "exp07_adversaries",
    ),
    "femnist": ("exp06_cnn_femnist",),
    "shakespeare": ("exp06_rnn_shakespeare",),
}


def main(
    out: Annotated[Path, typer.Option(help="The folder of all runs.")],
    cifar10: Annotated[
        Path | None, typer.Option(help="CIFAR-10's local folder; without it its experiments wait.")
    ] = None,
    femnist: Annotated[Path | None, typer.Option(help="A file of FEMNIST with its writers.")] = None,
    shakespeare: Annotated[Path | None, typer.Option(help="A file of Shakespeare's roles.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="0, 1, ... so many.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Only this experiment, by its file's stem; repeat.")] = None,
) -> None:
    """Run what is missing, then write the reports."""
    sources = {"cifar10": cifar10, "femnist": femnist, "shakespeare": shakespeare}
    chosen = {
        name: source.resolve()
        for data, source in sources.items()
        if source is not None
        for name in EXPERIMENTS[data]
        if not only or name in only
    }
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(seeds) for name in sorted(chosen)]
    with ThreadPoolExecutor(processes) as pool, Progress(console=console) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        pending = [pool.submit(run, name, seed, chosen[name], out) for name, seed in jobs]
        failed = []
        for job, future in zip(jobs, pending, strict=True):
            if fault := future.result():
                failed.append((*job, fault))
            progress.advance(bar)
    tables = [
        tables_of(name, [out / f"{name}-s{seed}" for seed in range(seeds)], out / name) for name in sorted(chosen)
    ]
    write_text(out / "claims.md", "\n".join([*tables, f"{READING}\n"]))
    print(out / "claims.md")
    for name, seed, fault in failed:
        console.print(f"[bold red]failed:[/bold red] {name}, seed {seed}: {fault}", highlight=False)
    raise typer.Exit(2 if failed else 0)


def run(name: str, seed: int, data: Path, out: Path) -> str:
    """Run one experiment with one seed where it is not finished; return the fault, '' if there is none."""
    folder = out / f"{name}-s{seed}"
    if (folder / "summary.json").exists():
        return ""
    tests = [f"data.test={data}"] if name not in ("exp06_cnn_femnist", "exp06_rnn_shakespeare") else []
    command = [
        sys.executable,
        "-c",
        "from fedllm_sec.cli import main; main()",
        "run",
        str(CONFIGS / f"{name}.yaml"),
        "scale=laptop",
    ]
    command += [f"data.train={data}", *tests, "training.threads=1", f"seed={seed}", f"out={folder}"]
    if folder.exists():
        command.append("--resume")
    with (out / f"{folder.name}.log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    return f"exit code {code}, see {log.name}" if code else ""


def tables_of(name: str, runs: list[Path], place: Path) -> str:
    """Write an experiment's report over its seeds, and return its table of claims without the note below it."""
    begun = [folder for folder in runs if (folder / "config.yaml").exists()]
    if not begun:
        return ""
    claims = report(begun, place / "report").with_name("claims.md")
    return claims.read_text(encoding="utf-8").replace(READING, "").rstrip() + "\n"


if __name__ == "__main__":
    typer.run(main)
