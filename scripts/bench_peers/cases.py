"""What is run: a model and a number of clients, under one of two algorithms, by each of the systems."""

from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["epoch", "step"]
Weights = Literal["equal", "samples"]
BATCH, LEARNING_RATE, ALPHA = 10, 0.03, 0.5


@dataclass(frozen=True)
class Case:
    """A federation.

    Attributes:
        name: of it.
        model: a small model of ours, which `networks` has too.
        clients: how many; all of them answer in every round.
    """

    name: str
    model: str
    clients: int


@dataclass(frozen=True)
class System:
    """Who runs it, and how.

    Attributes:
        name: of it, in tables.
        module: of this package; its `run(job)` does the work.
        peer: whether the peers' interpreter runs it.
        options: what `run` finds in the job; `threads` instead of everybody's.
    """

    name: str
    module: str
    peer: bool
    options: dict[str, object]


CASES = {
    case.name: case
    for case in (
        Case("lr-100", "lr", 100),
        Case("lenet-10", "lenet", 10),
        Case("lenet-100", "lenet", 100),
        Case("cnn-10", "cnn", 10),
    )
}
SYSTEMS = {
    system.name: system
    for system in (
        System("ours", "ours", False, {"together": None}),
        System("ours-one-by-one", "ours", False, {"together": False}),
        System("ours-1-thread", "ours", False, {"together": None, "threads": 1}),
        System("flower", "flower_server", True, {"sliced": False}),
        System("flower-sliced", "flower_server", True, {"sliced": True}),
        System("byzfl", "byzfl_rounds", True, {"sliced": False}),
        System("byzfl-sliced", "byzfl_rounds", True, {"sliced": True}),
        System("byzfl-sliced-1-thread", "byzfl_rounds", True, {"sliced": True, "threads": 1}),
    )
}
