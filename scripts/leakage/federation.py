"""What a defense costs: the test accuracy of a small federation whose clients all use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedllm_sec import Round, UpdateSet, aggregate
from leakage.clients import Text, learner, sent, whole
from leakage.rows import Row, generator


@dataclass(frozen=True)
class Federation:
    """Its size and how clients train; all take part in all rounds, with AdamW.

    Attributes:
        clients: each has its share of the training texts.
        rounds: of FedAvg.
        steps: local ones in a round.
        batch: examples in each.
        rate: the learning rate.
        rank: of the adapter.
    """

    clients: int = 4
    rounds: int = 6
    steps: int = 4
    batch: int = 16
    rate: float = 6e-3
    rank: int = 4


def accuracy(
    base: Path,
    row: Row,
    how: Federation,
    train: Sequence[Text],
    test: Sequence[Text],
    seed: int,
    on_round: Callable[[], None],
) -> float:
    """The share of test texts that the last global model has right.

    The adapter starts with B = 0, as PEFT makes it; batches are the same for all rows, the noise of dropout is not.
    """
    model = learner(base, fresh(row), how.rank, seed)
    current = model.state()
    order = torch.randperm(len(train), generator=generator("split", seed)).tolist()
    for number in range(1, how.rounds + 1):
        at = Round(index=number, seed=seed)
        rows = []
        for client in range(how.clients):
            own = order[client :: how.clients]
            model.load(current)
            steps = (row.first_steps if number == 1 else None) or how.steps
            drawn = torch.randint(len(own), (steps, how.batch), generator=at.generator("batches", client)).tolist()
            torch.manual_seed(at.seed_for("dropout", client))
            model.train([[train[own[i]] for i in batch] for batch in drawn], "adamw", row.rate * how.rate)
            rows.append(sent(row, model.state(), current, f"client_{client}", at))
        change = whole(aggregate(together(rows), at))
        current = {name: value + change[name].reshape(value.shape) for name, value in current.items()}
        on_round()
    model.load(current)
    return model.accuracy(test)


def fresh(row: Row) -> Row:
    """The same row with an adapter as PEFT makes it."""
    return replace(row, fresh=True)


def together(rows: Sequence[UpdateSet]) -> UpdateSet:
    """All rows in one set."""
    first, *others = rows
    for other in others:
        first = first.concat(other)
    return first
