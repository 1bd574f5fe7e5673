"""Running a matrix: its folders, its cells in parallel, and what came of them."""

import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedllm_sec.config import to_yaml
from fedllm_sec.federation.experiment import summary
from fedllm_sec.federation.matrix.cells import Job, Outcome, cores, hushed
from fedllm_sec.federation.matrix.results import collect, cost, rows_of
from fedllm_sec.federation.matrix.settings import Matrix
from fedllm_sec.federation.matrix.workers import outcomes
from fedllm_sec.federation.run_folder import check_free, claim
from fedllm_sec.federation.shared import SHARED
from fedllm_sec.federation.trackers import check_trackers
from fedllm_sec.reports.read import SUCCESS
from fedllm_sec.tasks.arrays import ArrayTask
from fedllm_sec.tasks.task import Classification, task
from fedllm_sec.terminal import console
from fedllm_sec.training.prepare import prepare_base
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_json


def run_matrix(matrix: Matrix, processes: int | None = None, *, resume: bool = False) -> list[Outcome]:
    """Run the cells that are not whole yet, and return what became of each.

    Args:
        matrix: which.
        processes: how many; None: as many as there are cores for (adapters: GPUs, if there are any).
        resume: go on with one that was cut off; cells that failed are tried again.

    Raises:
        InputError: if the folder is not free, data or model cannot be had, or no cell has the metric.
    """
    first = matrix.configs[0]
    work = task.build(first.task.name, first.task.parameters)
    small = isinstance(work, ArrayTask)
    check_trackers(first.trackers)
    take_folders(matrix, resume=resume)
    if not small:
        with hushed():
            prepare_base(first.model, classifies=isinstance(work, Classification))  # once, and not in every process
    every = [Job(config.seed, cell) for config in matrix.configs for cell in matrix.cells if cell.name in config.arms]
    jobs = [job for job in every if rows_of(job.folder(matrix), matrix.config(job.seed)) is None]
    count = min(processes or default_processes(first.training.threads, small), max(len(jobs), 1))
    rows, columns = len(matrix.settings.attacks), len(matrix.settings.defenses)
    say(
        f"{rows} attacks x {columns} defenses x {len(matrix.configs)} seeds: {len(every)} cells can be, "
        f"{len(every) - len(jobs)} are done; processes: {count}"
    )
    left = Counter(job.seed for job in jobs)
    done = []
    with Bar(len(every), len(every) - len(jobs)) as bar, closing(outcomes(matrix, jobs, count)) as found:
        for outcome in found:
            check_metric(matrix, outcome)
            bar.show(matrix, outcome)
            done.append(outcome)
            left[outcome.job.seed] -= 1
            if not left[outcome.job.seed] and matrix.settings.keep == "models":
                shutil.rmtree(matrix.folder / f"seed_{outcome.job.seed}" / SHARED, ignore_errors=True)
    return done


def take_folders(matrix: Matrix, *, resume: bool) -> None:
    """Make the folders of the matrix and of its seeds ours.

    Raises:
        InputError: if they hold something else.
    """
    folders = {matrix.folder: matrix.text, **{Path(each.out or ""): to_yaml(each) for each in matrix.configs}}
    for folder, text in folders.items():
        check_free(folder, text, resume=resume)
    for folder, text in folders.items():
        claim(folder, text)


def default_processes(threads: int, small: bool) -> int:
    """One for each GPU, where adapters are trained on GPUs; else as many as have cores for their threads."""
    gpus = 0 if small else torch.cuda.device_count()
    return gpus or max(cores() // threads, 1)


def check_metric(matrix: Matrix, outcome: Outcome) -> None:
    """Raise InputError if a finished cell does not have the metric that is to be drawn."""
    metrics = outcome.job.folder(matrix).metrics(0)
    if metrics is not None and matrix.settings.metric not in metrics:
        known = [key for key, value in metrics.items() if isinstance(value, float) and not key.startswith(SUCCESS)]
        raise InputError(f"metric={matrix.settings.metric} is not measured here; there are {', '.join(known)}")


def finish(matrix: Matrix) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write what came of the matrix (`matrix.json`), of its seeds (`summary.json`), and what it cost (`cost.json`)."""
    result, paid = collect(matrix), cost(matrix)
    for config in matrix.configs:
        folder = Path(config.out or "")
        write_json(folder / "summary.json", summary(config, folder))
    write_json(matrix.folder / "matrix.json", result)
    write_json(matrix.folder / "cost.json", paid)
    return result, paid


class Bar:
    """How many cells are done, and how long the others will take; a line for each that is done.

    It has a terminal of its own, because cells are hushed.
    """

    def __init__(self, total: int, done: int):
        terminal = Console(stderr=True)
        columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True)
        self.cells = self.bar.add_task("cells", total=total, completed=done)

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, matrix: Matrix, outcome: Outcome) -> None:
        """Count a cell, and say how it ended."""
        self.bar.advance(self.cells)
        last = outcome.job.folder(matrix).metrics(matrix.configs[0].federation.rounds) or {}
        shown = [f"{key} {last[key]:.3f}" for key in (matrix.settings.metric, SUCCESS) if last.get(key) is not None]
        text = "  ".join(shown) if outcome.error is None else f"[red]failed[/red]: {escape(outcome.error)}"
        line = f"seed {outcome.job.seed} {outcome.job.cell.name:>28}: {text}  ({outcome.seconds:.1f} s)"
        self.bar.console.print(line, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Tell the user."""
    console.print(line, highlight=False, soft_wrap=True)
