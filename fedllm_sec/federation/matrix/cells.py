"""Running cells one after another in one process, which keeps what is trained for as long as the seed is the same."""

import gc
import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedllm_sec.config import Config, to_yaml
from fedllm_sec.federation.curious import rehearse_looks
from fedllm_sec.federation.experiment import environment, learner_of
from fedllm_sec.federation.learner import Learner
from fedllm_sec.federation.loop import Arm, prepare_arm
from fedllm_sec.federation.matrix.settings import Cell, Matrix
from fedllm_sec.federation.methods import Methods, build_methods
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.federation.shared import SHARED
from fedllm_sec.federation.success import Goals, goals_of
from fedllm_sec.federation.world import World
from fedllm_sec.registry import attack
from fedllm_sec.reports.split import draw_split
from fedllm_sec.settings import ArmSettings
from fedllm_sec.tasks.task import task
from fedllm_sec.terminal import console
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import write_text

logger = logging.getLogger(__name__)

FAILED = "failed.txt"  # in a cell's folder: why it was given up


class NothingToTrainError(InputError):
    """Data or model cannot be had: no cell can be run."""


class Job(NamedTuple):
    """A cell of a seed."""

    seed: int
    cell: Cell

    def folder(self, matrix: Matrix) -> ArmFolder:
        """Where it goes."""
        return ArmFolder(matrix.folder / f"seed_{self.seed}" / self.cell.name)


class Outcome(NamedTuple):
    """What became of a cell: why it failed, or None; `fatal` is why no cell can be run."""

    job: Job
    error: str | None
    seconds: float
    fatal: str | None = None


class Loaded(NamedTuple):
    """What the cells of a seed have in common."""

    config: Config
    learner: Learner
    environment: dict[str, Any]


@dataclass
class CellRunner:
    """Runs cells.

    Attributes:
        matrix: whose.
        world: this process.
        loaded: of the last seed.
        wanted: the attack of each row, built once: what they want is asked in many cells.
    """

    matrix: Matrix
    world: World = field(default_factory=World)
    loaded: Loaded | None = None
    wanted: dict[str, Methods] = field(default_factory=dict)

    def prepare(self, seed: int) -> Loaded:
        """Load what the cells of a seed have in common, unless it was the last cell's too.

        Raises:
            NothingToTrainError: for anything wrong with the data or the model.
        """
        config = self.matrix.config(seed)
        if self.loaded is None or self.loaded.config.seed != seed:
            self.loaded = None  # two at once may be too much
            torch.set_num_threads(config.training.threads)
            work = task.build(config.task.name, config.task.parameters)
            try:
                with hushed():
                    learner = learner_of(config, work, self.world)
            except InputError as error:
                raise NothingToTrainError(str(error)) from None
            folder = Path(config.out or "")
            if not (folder / "split.svg").exists() and (split := learner.split()):
                draw_split(*split, folder)
            self.loaded = Loaded(config, learner, environment(learner, self.world))
            gc.freeze()
        return self.loaded

    def run(self, job: Job) -> str | None:
        """Run what is left of a cell; return why it failed, which also goes into its folder, or None.

        Raises:
            NothingToTrainError: for anything wrong with the data or the model.
        """
        folder = job.folder(self.matrix)
        (folder.path / FAILED).unlink(missing_ok=True)
        try:
            with hushed():
                self.arm(job, folder).run()
        except NothingToTrainError:
            raise
        except Exception as error:  # whatever it is, other cells go on
            fail(folder, traceback.format_exc())
            return one_line(error)
        if self.matrix.settings.keep == "models":
            forget_updates(folder)
        return None

    def arm(self, job: Job, folder: ArmFolder) -> Arm:
        """The cell as an arm, its folder begun."""
        config, learner, here = self.prepare(job.seed)
        name = job.cell.name
        settings = config.arms[name]
        alone = config.model_copy(update={"arms": {name: settings}})
        prepare_arm(folder, to_yaml(alone), here, learner)
        methods = build_methods(settings, config)
        rehearse_looks(alone, {name: methods.attack}, learner)
        goals = self.goals(job.cell, config)
        if methods.attack is None:
            goals = measurable(goals, learner, folder.global_model(0))
        cache = Path(config.out or "") / SHARED
        return Arm(name, settings, methods, config, folder, self.world, learner, goals, cache)

    def goals(self, cell: Cell, config: Config) -> Goals:
        """What is measured of a cell's models: those of the clean row are the floors of all attacks."""
        if not self.wanted:
            nothing = build_methods(ArmSettings(), config)
            for row, arm in self.matrix.settings.attacks.items():
                chosen = arm.attack if arm else None
                built = attack.build(chosen.name, chosen.parameters) if chosen else None
                self.wanted[row] = nothing._replace(attack=built)
        rows = {each.name: each.attack for each in self.matrix.cells}
        return goals_of(cell.name, config, {name: self.wanted[rows[name]] for name in config.arms})


def attempt(runner: CellRunner, job: Job) -> Outcome:
    """Run one cell."""
    began = time.perf_counter()
    try:
        return Outcome(job, runner.run(job), time.perf_counter() - began)
    except NothingToTrainError as error:
        return Outcome(job, None, 0.0, str(error))


def measurable(goals: Goals, learner: Learner, model: Path) -> Goals:
    """The goals that can be measured: one that cannot is told in the cells of its own attack, not in the clean row."""
    found = {}
    for name, goal in goals.items():
        try:
            learner.success(model, goal)
            found[name] = goal
        except InputError as error:
            logger.warning("%s cannot be measured: %s", name, error)
    return found


def forget_updates(folder: ArmFolder) -> None:
    """Delete the tensors of a cell's rounds: what clients sent, and the memories of defenses."""
    for path in folder.path.glob("round_*/**/*.safetensors"):
        path.unlink()


def fail(folder: ArmFolder, text: str) -> None:
    """Keep why a cell was given up."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / FAILED, text)


def one_line(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


@contextmanager
def hushed() -> Iterator[None]:
    """Say nothing on the terminal: cells in many processes would all speak at once."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
