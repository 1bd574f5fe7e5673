"""The texts of a federation of adapters: read, limited and split over the clients."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fedllm_sec.config import Config
from fedllm_sec.federation.partition import partition
from fedllm_sec.randomness import derived_seed
from fedllm_sec.tasks.task import Classification, Example, Task
from fedllm_sec.updates.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")
HELD_OUT = 5  # where no test set is given, every fifth row of a shuffled training set


@dataclass(frozen=True)
class Data:
    """What the clients train on, what the server trains on itself, and what it tests on."""

    shards: list[list[Example]]
    root: list[Example]
    test: Sequence[Example]

    def digest(self) -> str:
        """A hash of every text and who has it."""
        digest = hashlib.sha256()
        for rows in (*self.shards, *([self.root] if self.root else []), self.test):
            for row in rows:
                digest.update(repr(row).encode())
            digest.update(b"|")
        return digest.hexdigest()


def load_data(config: Config, work: Task | Classification) -> Data:
    """Read, limit and split the data.

    Raises:
        InputError: if a source cannot be read, or a client or the server would be left without texts.
    """
    settings = config.data
    train = list(work.read(settings.train, "train"))
    if settings.test is None:
        order = torch.randperm(len(train), generator=seeded(config.seed, "held out")).tolist()
        test = [train[i] for i in order[::HELD_OUT]]
        train = [train[i] for k, i in enumerate(order) if k % HELD_OUT]
        logger.warning("no data.test given: %d of %d rows of data.train are held out", len(test), len(order))
    else:
        test = list(work.read(settings.test, "test"))
    train, test = (
        limited(rows, limit, config.seed)
        for rows, limit in ((train, settings.train_limit), (test, settings.test_limit))
    )
    root = limited(train, config.federation.root_samples, config.seed) if config.federation.root_samples else []
    if len(root) == len(train):
        raise InputError(f"federation.root_samples={config.federation.root_samples}: nothing is left for the clients")
    if root:
        kept = set(map(id, root))
        train = [row for row in train if id(row) not in kept]
    shares = partition([row.label for row in train], config.federation.clients, settings.partition, config.seed)
    return Data([[train[i] for i in share] for share in shares], root, test)


def limited(rows: list[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` rows, drawn by the seed, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    kept = torch.randperm(len(rows), generator=seeded(seed, "limit"))[:limit].sort().values
    return [rows[i] for i in kept.tolist()]


def seeded(*names: object) -> torch.Generator:
    """A generator of its own for a purpose."""
    return torch.Generator().manual_seed(derived_seed(*names))
