"""What `fedllm-sec run` and the recipes do: configuration, experiment, report, table."""

from collections.abc import Sequence
from pathlib import Path

from fedllm_sec.federation.experiment import load_config, run_experiment
from fedllm_sec.federation.progress import console
from fedllm_sec.federation.world import World
from fedllm_sec.reports.page import report
from fedllm_sec.reports.read import read_run
from fedllm_sec.reports.table import results_table


def run_command(path: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """Run the experiment of a configuration file in the processes of this launch.

    Raises:
        InputError: for anything wrong with configuration or data.
    """
    world = World.from_environment()
    config = load_config(path, overrides, world)
    folder = run_experiment(config, world, resume=resume)
    if world.is_main:
        page = report([folder])
        console.print(results_table([read_run(folder)]))
        console.print("report:", end=" ")
        print(page)
