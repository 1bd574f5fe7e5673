"""What `fedllm-sec run` and the recipes do: configuration, experiment, report, table."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.logging import RichHandler
from rich.markup import escape

from fedllm_sec.federation.world import World
from fedllm_sec.terminal import console
from fedllm_sec.updates.errors import InputError


def run_script(description: str | None, config: Path) -> int:
    """What a recipe does: its command line, then `run_recipe`.

    Args:
        description: of the script, for `--help`.
        config: the configuration that it runs by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field, e.g. federation.rounds=3")
    given = parser.parse_intermixed_args()
    return run_recipe(given.config, given.overrides, resume=given.resume)


def run_recipe(path: Path, overrides: Sequence[str], *, resume: bool) -> int:
    """`run_command` for a script: an error that the user can mend is told once; return the exit code.

    (`accelerate launch` makes 1 of any exit code but 0, and adds a traceback of its own.)
    """
    world = World.from_environment()
    try:
        run_command(path, overrides, world, resume=resume)
    except InputError as error:
        if world.is_first(str(error)):
            console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return 0


def run_command(path: Path, overrides: Sequence[str], world: World, *, resume: bool) -> None:
    """Run the experiment of a configuration file in the processes of this launch.

    Raises:
        InputError: for anything wrong with configuration or data.
    """
    quieten(world)  # before the heavy imports, some of which talk
    from fedllm_sec.federation.experiment import load_config, run_experiment
    from fedllm_sec.reports.claims import claims_table, findings
    from fedllm_sec.reports.page import report
    from fedllm_sec.reports.read import Group, read_run
    from fedllm_sec.reports.table import results_table

    config = load_config(path, overrides, world)
    folder = run_experiment(config, world, resume=resume)
    if world.is_main:
        page = report([folder])
        done = Group([read_run(folder)])
        console.print(results_table([done]))
        if found := findings(done):
            console.print(claims_table(found))
        console.print("report:", end=" ")
        sys.stderr.flush()
        print(page)


def quieten(world: World) -> None:
    """Let the main process alone speak, and of the libraries only what is an error."""
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("fedllm_sec").setLevel(logging.INFO if world.is_main else logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on import that it chose so
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # it tells every retry twice
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
