"""A federation of adapters: each client fine-tunes the server's adapter on one shared base, with `Trainer`.

Or, without an adapter, the whole base; nothing else changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from fedllm_sec.attacks.reconstruction.judge import visible_prefix
from fedllm_sec.config import Config
from fedllm_sec.core import Round
from fedllm_sec.federation.evaluator import Evaluator
from fedllm_sec.federation.learner import Split, Training, Truth, finite
from fedllm_sec.federation.progress import StepCallback
from fedllm_sec.federation.run_folder import SERVER, ArmFolder, client_name, load_adapter, save_adapter
from fedllm_sec.federation.texts import Data
from fedllm_sec.federation.world import World
from fedllm_sec.tasks.forms import Form
from fedllm_sec.tasks.task import Example
from fedllm_sec.training.base_model import BaseModel, files_of
from fedllm_sec.training.client import train_client
from fedllm_sec.training.local import LocalCallback
from fedllm_sec.training.schedule import factor
from fedllm_sec.training.seen import texts_seen
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_json
from fedllm_sec.victim import Victim


@dataclass(frozen=True)
class AdapterLearner:
    """`Learner` for models of transformers that read texts, with LoRA or whole.

    Attributes:
        base: the shared model.
        fresh: the adapter that a run begins with.
        data: the texts.
        config: the experiment's.
        world: the processes.
        form: of the task.
        evaluate: gives the metrics of an adapter folder.
        judges: the same of the texts on which attacks want to succeed, by their goals; filled as they are asked for.
    """

    base: BaseModel
    fresh: Mapping[str, Tensor]
    data: Data
    config: Config
    world: World
    form: Form
    evaluate: Evaluator
    judges: dict[Callable[[Any], Any], Evaluator] = field(default_factory=dict)

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
        save_adapter(self.fresh, self.base.configuration(), folder)

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
            folder, honest = training.out / client_name(client), client not in training.poisoning.clients
            watched = client in training.victims  # what was trained elsewhere was not seen here
            if honest and not watched and training.shared.take([client], folder.joinpath):
                training.progress.client_step(client, self.steps(client))
                continue
            self.train_client(training, client, received)
            if honest and training.cache:
                training.shared.keep([client], [(path.name, path) for path in folder.iterdir()])

    def train_client(self, training: Training, client: int, received: Mapping[str, Tensor]) -> None:
        """One client's turn."""
        texts = self.texts(client)
        samples = len(texts)
        callbacks: list[TrainerCallback] = [StepCallback(training.progress, client)]
        if client in training.poisoning.clients:
            texts = training.poisoning.change(client, texts)
            if local := training.poisoning.local(client):
                callbacks.append(LocalCallback(local, self.base.parameters))
        rows = self.form.rows(texts)
        index = training.round.index
        seed = training.round.seed_for(client_name(client), "train")
        watched = client in training.victims
        watching: AbstractContextManager[list[list[int]]]
        watching = texts_seen(self.base.model) if watched else nullcontext([])
        with watching as texts_of_turn:
            turn = train_client(
                self.base,
                rows,
                received,
                training.poisoning.training(client, self.config.training),
                seed=seed,
                rounds_done=index - 1,
                rounds=self.config.federation.rounds,
                callbacks=callbacks,
            )
        if watched:
            self.keep_truth(training.folder.trained_on(index, client), texts_of_turn)
        loss = turn.loss
        if self.world.sharded:  # each process saw its own part of every batch
            losses = self.world.gather(loss)
            loss = math.fsum(losses) / len(losses)
        if self.world.is_main or not self.world.sharded:
            claims: dict[str, Any] = {"client": client_name(client), "round": index, "num_samples": samples}
            claims |= {"seed": seed, "loss": finite(loss), "steps": turn.steps, "seconds": turn.seconds}
            save_adapter(turn.adapter, self.base.configuration(), training.out / client_name(client), client=claims)

    def keep_truth(self, path: Path, texts: list[list[int]]) -> None:
        """Write what went through the model in a client's turn, for whoever judges an attack."""
        if self.world.sharded:  # each process saw its own part of every batch
            texts = [text for part in self.world.gather(texts) for text in part]
        if self.world.is_main or not self.world.sharded:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"texts": texts})

    def victim(self, received: Path, index: int, client: int) -> Victim:
        """The learning rate is the mean over the steps of the round; a batch is that of one optimizer step."""
        training, steps, rounds = self.config.training, self.steps(client), self.config.federation.rounds
        factors = [factor(training, (index - 1 + step / steps) / rounds) for step in range(steps)]
        together = (training.batch_size or 1) * training.gradient_accumulation
        return Victim(
            learning_rate=training.learning_rate * math.fsum(factors) / steps,
            steps=steps,
            batch_size=min(together * (self.world.size if self.world.sharded else 1), len(self.texts(client))),
            optimizer=training.optimizer,
            weight_decay=training.weight_decay,
            momentum=training.momentum if training.optimizer == "sgd" else 0.0,
            max_grad_norm=training.max_grad_norm,
            base=files_of(self.base.model),
            adapter=self.base.configuration() if self.base.is_adapted else None,
        )

    def truth(self, folder: ArmFolder, round: Round, client: int) -> Truth:
        """The texts that went through the model, as far as an update can tell of them (`visible_prefix`)."""
        texts = read_json(folder.trained_on(round.index, client))["texts"]
        visible = dict.fromkeys(visible_prefix(text, causal=self.form.causal) for text in texts)
        return Truth(texts=tuple(visible), decode=self.base.tokenizer.decode)

    def wanted(self, goal: Callable[[Any], Any]) -> Any:
        """Some of the test texts, changed."""
        found = goal(self.data.test)
        if not found:
            raise InputError("the attack found no test example to act on; give it another source or target")
        return found

    def success(self, folder: Path, goal: Callable[[Any], Any]) -> float:
        """How often the labels that an attack wants are the likeliest; without labels, how often its words are."""
        if goal not in self.judges:
            self.judges[goal] = self.evaluate.on(self.wanted(goal))
        measured = self.judges[goal](folder)
        return measured["accuracy" if "accuracy" in measured else "exact"]

    def show(self, model: Path, folder: Path) -> None:
        """An adapter makes nothing that could be drawn."""
