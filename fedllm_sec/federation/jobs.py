"""What clients of small models have to do in a round, who does it together, and what they say of it afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm_sec.core import Local
from fedllm_sec.federation.learner import finite
from fedllm_sec.federation.run_folder import client_name
from fedllm_sec.settings import TrainingSettings
from fedllm_sec.tasks.arrays import Arrays
from fedllm_sec.training.plan import Plan
from fedllm_sec.training.small import Trained


@dataclass(frozen=True)
class Job:
    """One client's training in a round: which examples and batches, how, from which seed; an adversary's part."""

    client: int
    pool: Arrays
    work: Plan
    samples: int
    seed: int
    settings: TrainingSettings
    local: Local | None = None


def groups(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that are done together: at most `size`, from one pool."""
    group: list[Job] = []
    for job in jobs:
        alike = group and job.pool is group[0].pool and job.settings == group[0].settings
        if group and (len(group) == size or not alike or job.local):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def claims(group: Sequence[Job], trained: Trained, index: int, seconds: float) -> list[dict[str, Any]]:
    """What each client says of its training."""
    losses, steps = trained.loss.tolist(), trained.steps.tolist()
    return [
        {
            "client": client_name(job.client),
            "round": index,
            "num_samples": job.samples,
            "seed": job.seed,
            "loss": finite(loss),
            "steps": done,
            "seconds": seconds,
        }
        for job, loss, done in zip(group, losses, steps, strict=True)
    ]
