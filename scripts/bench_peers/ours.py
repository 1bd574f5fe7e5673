"""Our own federation, through `run_experiment`: every update, model and decision goes to files, as in any run."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bench_peers.given import write_state
from fedllm_sec.config import validated
from fedllm_sec.federation.command import quieten
from fedllm_sec.federation.experiment import run_experiment
from fedllm_sec.federation.run_folder import ArmFolder
from fedllm_sec.federation.world import World
from fedllm_sec.updates.files import read_json
from fedllm_sec.updates.sources import MODEL_FILE

ARM = "benign"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds; the final model goes to `job["final"]`.

    Returns:
        `seconds`: of each round as a whole, files, records and a test on one example among it; and the `times` that the
        run wrote down of its parts.
    """
    world = World.from_environment()
    quieten(world)
    tree = job["config"]
    training = {**tree["training"], "together": job["together"], "threads": job["threads"]}
    config = validated({**tree, "training": training, "out": job["out"]}, "the benchmark")
    folder = ArmFolder(run_experiment(config, world) / ARM)
    rounds = config.federation.rounds
    times = [read_json(folder.round(number) / "timing.json") for number in range(1, rounds + 1)]
    write_state(Path(job["final"]), load_file(folder.global_model(rounds) / MODEL_FILE))
    return {"seconds": [each["round_seconds"] for each in times], "times": times}
