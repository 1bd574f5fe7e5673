"""Launch the recipe as a user does, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "pythia_pubmedqa.py"
EQUAL = ("*.safetensors", "metrics.json", "metrics.jsonl", "adapter_config.json", "decision.json", "config.yaml")


def command(accelerate_config: str | None, *arguments: str, recipe: Path = RECIPE) -> list[str]:
    """`accelerate launch` with one of our configurations, or plain python."""
    if accelerate_config is None:
        return [sys.executable, str(recipe), *arguments]
    config = str(ROOT / "configs" / "accelerate" / f"{accelerate_config}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    if yaml.safe_load(Path(config).read_text())["num_processes"] == 1:
        launcher = launcher[:-2]
    return [*launcher, "--config_file", config, str(recipe), *arguments]


def launch(
    accelerate_config: str | None, *arguments: str, cwd: Path, timeout: float = 540, recipe: Path = RECIPE
) -> subprocess.CompletedProcess:
    """Run to the end; a failure shows what was printed."""
    done = subprocess.run(
        command(accelerate_config, *arguments, recipe=recipe),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def fingerprint(folder: Path) -> dict[str, bytes]:
    """The bytes of everything in a run's folder that must be equal in an equal run: all but times and machine."""
    files = {str(path.relative_to(folder)): path.read_bytes() for form in EQUAL for path in folder.rglob(form)}
    for path in folder.rglob("client.json"):
        claims = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        files[str(path.relative_to(folder))] = json.dumps(claims).encode()
    return files


def assert_same_run(one: Path, other: Path) -> None:
    first, second = fingerprint(one), fingerprint(other)
    assert first.keys() == second.keys()
    assert first
    assert [name for name in first if first[name] != second[name]] == []
