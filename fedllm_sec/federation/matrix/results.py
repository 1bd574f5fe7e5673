"""What came of a matrix: the last rounds of every cell and seed, their means and spreads, and what it cost."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedllm_sec.config import Config
from fedllm_sec.federation.matrix.cells import FAILED, Job
from fedllm_sec.federation.matrix.settings import Cell, Matrix
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.federation.shared import NOTE
from fedllm_sec.reports.read import LEAKAGE, SUCCESS
from fedllm_sec.updates.files import read_json

LAST = 5  # rounds, of which the mean counts: one round alone is noise
FLOOR = "floor"
STEALTH = "stealth/"
LIFESPAN = "lifespan"


def collect(matrix: Matrix) -> dict[str, Any]:
    """The numbers of a matrix: all that its figures and its page show; the same runs, the same bytes.

    Of every cell `seeds` has the numbers of each seed that is whole, `mean` and `spread` (the sample standard
    deviation, None where fewer than two seeds have the number) are over those, and `failed` says why others are not.
    """
    settings, first = matrix.settings, matrix.configs[0]
    return {
        "name": first.name,
        "scale": first.scale,
        "metric": settings.metric,
        "rounds": first.federation.rounds,
        "last": min(LAST, first.federation.rounds),
        "seeds": list(settings.seeds),
        "attacks": list(settings.attacks),
        "defenses": list(settings.defenses),
        "cells": [of_cell(matrix, cell) for cell in matrix.cells],
    }


def of_cell(matrix: Matrix, cell: Cell) -> dict[str, Any]:
    """One cell's part."""
    jobs = [Job(seed, cell) for seed in matrix.settings.seeds]
    found = {str(job.seed): numbers for job in jobs if (numbers := of_job(matrix, job)) is not None}
    paths = {str(job.seed): job.folder(matrix).path / FAILED for job in jobs}
    mean, spread = over_seeds(found.values())
    return {
        "attack": cell.attack,
        "defense": cell.defense,
        "folders": {str(job.seed): f"seed_{job.seed}/{cell.name}" for job in jobs if str(job.seed) in found},
        "seeds": found,
        "mean": mean,
        "spread": spread,
        "failed": {seed: last_line(path.read_text("utf-8")) for seed, path in paths.items() if path.exists()},
        "impossible": matrix.impossible.get(cell.name),
    }


def of_job(matrix: Matrix, job: Job) -> dict[str, float | None] | None:
    """The numbers of a cell in one seed; None if it is not whole."""
    config = matrix.config(job.seed)
    rows = rows_of(job.folder(matrix), config)
    if rows is None:
        return None
    numbers = last_rounds(rows, matrix.settings.metric)
    floor = floor_of(matrix, job)
    return numbers if floor is None or SUCCESS not in numbers else {**numbers, FLOOR: floor}


def rows_of(folder: ArmFolder, config: Config) -> list[dict[str, Any]] | None:
    """The metrics of every round; None if some are missing."""
    rounds = config.federation.rounds
    if not all((folder.round(index) / "metrics.json").exists() for index in range(rounds + 1)):
        return None
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: rounds + 1]]


def last_rounds(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float | None]:
    """The means over the last rounds of the metric, of success, stealth and leakage, and the lifespan at the end.

    Stealth and leakage are measured in rounds of an attack: its last ones count. None: the model diverged.
    """
    trained = rows[1:]
    numbers = {key: mean_of([row[key] for row in trained[-LAST:]]) for key in (metric, SUCCESS) if key in rows[-1]}
    for key in sorted({key for row in trained for key in row if key.startswith((STEALTH, LEAKAGE))}):
        numbers[key] = mean_of([row[key] for row in trained if row.get(key) is not None][-LAST:])
    if LIFESPAN in rows[-1]:
        numbers[LIFESPAN] = rows[-1][LIFESPAN]
    return numbers


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None if any is None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def floor_of(matrix: Matrix, job: Job) -> float | None:
    """How often the model of the same defense without any attack does this attack's will; None: not known."""
    row = matrix.settings.attacks[job.cell.attack]
    config = matrix.config(job.seed)
    clean = Job(job.seed, Cell(matrix.settings.clean, job.cell.defense))
    rows = rows_of(clean.folder(matrix), config)
    if row is None or rows is None:
        return None
    for key in rows[-1]:
        arm = config.arms.get(key.removeprefix(f"{SUCCESS}/"))
        if key.startswith(f"{SUCCESS}/") and arm and arm.attack == row.attack:
            return mean_of([each[key] for each in rows[1:][-LAST:]])
    return None


def over_seeds(
    seeds: Iterable[Mapping[str, float | None]],
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Mean and sample standard deviation of every number, over the seeds that have it."""
    found = list(seeds)
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for key in dict.fromkeys(key for numbers in found for key in numbers):
        known = [value for numbers in found if (value := numbers.get(key)) is not None]
        mean[key] = math.fsum(known) / len(known) if known else None
        spread[key] = statistics.stdev(known) if len(known) > 1 else None
    return mean, spread


def last_line(text: str) -> str:
    """The last line of a traceback: what went wrong."""
    return text.strip().splitlines()[-1] if text.strip() else "no reason was written"


def cost(matrix: Matrix) -> dict[str, Any]:
    """The seconds of all rounds, and how many trainings of clients there were, and how many were another cell's."""
    seeds = [matrix.folder / f"seed_{seed}" for seed in matrix.settings.seeds]
    times = [read_json(path)["round_seconds"] for seed in seeds for path in seed.glob("*/round_*/timing.json")]
    notes = [read_json(path) for seed in seeds for path in seed.glob(f"*/round_*/**/{NOTE}")]
    shared = sum(len(note["linked"]) for note in notes)
    trainings = shared + sum(note["trained"] for note in notes)
    share = shared / trainings if trainings else 0.0
    return {"seconds": round(math.fsum(times), 1), "trainings": trainings, "shared": shared, "share": share}
