"""A federation of adapters: each client fine-tunes the server's adapter on one shared base, with `Trainer`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedllm_sec.config import Config
from fedllm_sec.federation.evaluator import Evaluator
from fedllm_sec.federation.learner import Split, Training, finite
from fedllm_sec.federation.progress import StepCallback
from fedllm_sec.federation.run_folder import SERVER, client_name, load_adapter, save_adapter
from fedllm_sec.federation.texts import Data
from fedllm_sec.federation.world import World
from fedllm_sec.tasks.encoding import TrainingRows
from fedllm_sec.tasks.task import Example
from fedllm_sec.training.base_model import BaseModel
from fedllm_sec.training.client import train_client


@dataclass(frozen=True)
class AdapterLearner:
    """`Learner` for causal language models with LoRA.

    Attributes:
        base: the shared model.
        fresh: the adapter that a run begins with.
        data: the texts.
        config: the experiment's.
        world: the processes.
        max_length: of a text, in tokens.
        evaluate: gives the metrics of an adapter folder.
    """

    base: BaseModel
    fresh: Mapping[str, Tensor]
    data: Data
    config: Config
    world: World
    max_length: int
    evaluate: Evaluator

    @property
    def description(self) -> str:
        """The base's."""
        return self.base.description

    @property
    def has_root(self) -> bool:
        """Whether the server kept texts."""
        return bool(self.data.root)

    def digest(self) -> str:
        """Of all texts."""
        return self.data.digest()

    def split(self) -> Split | None:
        """By the task's labels."""
        rows = [row for shard in self.data.shards for row in shard]
        if any(row.label is None for row in rows) or not rows[0].labels:
            return None
        places = iter(range(len(rows)))
        shares = [[next(places) for _ in shard] for shard in self.data.shards]
        return Split([int(row.label or 0) for row in rows], shares, [label.strip() for label in rows[0].labels])

    def start(self, folder: Path) -> None:
        """Write the fresh adapter."""
        save_adapter(self.fresh, self.base.adapter_config(), folder)

    def texts(self, client: int) -> Sequence[Example]:
        """A client's texts, or the server's."""
        return self.data.root if client == SERVER else self.data.shards[client]

    def steps(self, client: int) -> int:
        """As configured, or as many as the epochs take."""
        training = self.config.training
        if training.steps:
            return training.steps
        assert training.batch_size is not None
        together = training.batch_size * training.gradient_accumulation
        return math.ceil(len(self.texts(client)) / together * training.epochs)

    def train(self, training: Training) -> None:
        """One client after another; each writes its adapter folder."""
        received = load_adapter(training.received)
        for client in training.clients:
            self.train_client(training, client, received)

    def train_client(self, training: Training, client: int, received: Mapping[str, Tensor]) -> None:
        """One client's turn."""
        texts = self.texts(client)
        texts = training.poisoned(texts) if client in training.changed else texts
        rows = TrainingRows(texts, self.base.tokenizer, self.max_length)
        index = training.round.index
        seed = training.round.seed_for(client_name(client), "train")
        turn = train_client(
            self.base,
            rows,
            received,
            self.config.training,
            seed=seed,
            rounds_done=index - 1,
            rounds=self.config.federation.rounds,
            callbacks=[StepCallback(training.progress, client)],
        )
        loss = turn.loss
        if self.world.sharded:  # each process saw its own part of every batch
            losses = self.world.gather(loss)
            loss = math.fsum(losses) / len(losses)
        if self.world.is_main or not self.world.sharded:
            claims: dict[str, Any] = {"client": client_name(client), "round": index, "num_samples": len(rows)}
            claims |= {"seed": seed, "loss": finite(loss), "steps": turn.steps, "seconds": turn.seconds}
            save_adapter(turn.adapter, self.base.adapter_config(), training.folder.client(index, client), client=claims)

    def show(self, model: Path, folder: Path) -> None:
        """An adapter makes nothing that could be drawn."""
