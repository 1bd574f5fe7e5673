"""A federation of small models: the clients of a round train side by side, and send their whole models."""

import copy
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedllm_sec.config import Config
from fedllm_sec.core import Round
from fedllm_sec.federation.buffers import FILE as BUFFERS_FILE
from fedllm_sec.federation.examples import Examples
from fedllm_sec.federation.jobs import Job, claims, groups
from fedllm_sec.federation.learner import Split, Training, Truth
from fedllm_sec.federation.run_folder import BUFFERS, MANY, SERVER, ArmFolder, client_name, save_many
from fedllm_sec.federation.world import World
from fedllm_sec.reports.samples import draw_samples
from fedllm_sec.settings import TrainingSettings
from fedllm_sec.tasks.arrays import Arrays, ArrayTask
from fedllm_sec.training.procedures import procedure
from fedllm_sec.training.schedule import factor
from fedllm_sec.training.small import Trained, train_each, train_one
from fedllm_sec.training.stacked import SideBySide, can_be_stacked, clients_at_once, pays
from fedllm_sec.updates.device import parse_bytes
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import atomic_folder
from fedllm_sec.updates.sources import MODEL_FILE
from fedllm_sec.victim import Victim

PREPARED = 2**31  # bytes; examples that take no more are prepared once for the whole run


class ModelLearner:
    """`Learner` for models that are small enough to be sent whole.

    Args:
        model: the architecture; its weights are those that a run begins with.
        description: of it.
        work: the task.
        examples: of the clients, the server and the test.
        config: the experiment's.
        world: the processes.
    """

    def __init__(
        self, model: nn.Module, description: str, work: ArrayTask, examples: Examples, config: Config, world: World
    ):
        self.model, self.description, self.work, self.config, self.world = model, description, work, config, world
        self.examples = examples
        self.lengths: dict[int, int] = {}  # of each client's work, in steps
        self.first = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.parameters = {name for name, _ in model.named_parameters()}
        self.procedure = procedure.build(config.training.procedure.name, config.training.procedure.parameters)
        self.procedure.check(model, config.training)
        if config.training.together and not (self.procedure.stackable and can_be_stacked(model)):
            raise InputError(
                f"training.together=true: model {config.model.name} under procedure {config.training.procedure.name} "
                "is trained client by client; leave training.together out"
            )
        self.pool, self.prepare = examples.train, self.procedure.prepare(work)
        if self.pool.x.is_floating_point() or 4 * self.pool.x.numel() <= PREPARED:
            self.pool, self.prepare = self.prepared(self.pool), as_it_is
        self.side_by_side = SideBySide(model, self.prepare)
        for client in [*range(len(examples.shards)), *([SERVER] if self.has_root else [])]:
            self.steps(client)  # a procedure may refuse a client: before any work

    @property
    def has_root(self) -> bool:
        """Whether the server kept examples."""
        return len(self.examples.root) > 0

    def digest(self) -> str:
        """Of all examples, and of an architecture that comes from a file."""
        architecture: str = getattr(self.model, "architecture", "")
        return self.examples.digest() + (hashlib.sha256(architecture.encode()).hexdigest() if architecture else "")

    def split(self) -> Split:
        """By classes."""
        shares = [shard.tolist() for shard in self.examples.shards]
        return Split(self.examples.train.y.tolist(), shares, self.work.classes)

    def prepared(self, arrays: Arrays) -> Arrays:
        """The same examples as the model takes them."""
        return arrays._replace(x=self.procedure.prepare(self.work)(arrays.x))

    def start(self, folder: Path) -> None:
        """Write the first model."""
        with atomic_folder(folder) as partial:
            save_file(
                {name: value for name, value in self.first.items() if name in self.parameters}, partial / MODEL_FILE
            )
            if len(self.first) > len(self.parameters):
                rest = {name: value for name, value in self.first.items() if name not in self.parameters}
                save_file(rest, partial / BUFFERS_FILE)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """A global model: parameters and buffers."""
        buffers = folder / BUFFERS_FILE
        return {**load_file(folder / MODEL_FILE), **(load_file(buffers) if buffers.exists() else {})}

    def places(self, client: int) -> Tensor:
        """Where a client's examples are."""
        return self.examples.root if client == SERVER else self.examples.shards[client]

    def steps(self, client: int) -> int:
        """As configured, or as many as the epochs take."""
        if client not in self.lengths:
            self.lengths[client] = len(self.procedure.plan(self.places(client), self.config.training, 0).sizes)
        return self.lengths[client]

    def train(self, training: Training) -> None:
        """Train side by side where that is possible, else one after another; each group's models are one file."""
        torch.set_num_threads(self.config.training.threads)
        received = self.load(training.received)
        clients = [client for client in training.clients if client != SERVER]
        jobs = [self.job(training, client) for client in clients]
        jobs.sort(key=lambda job: (job.client in training.poisoning.clients, -len(job.work.sizes)))  # long together
        for number, group in enumerate(groups(jobs, self.together(received))):
            self.train_group(training, group, training.out / f"{MANY}_{self.world.rank}_{number}", received)
            for job in group:
                training.progress.client_step(job.client, len(job.work.sizes))
        if SERVER in training.clients:
            self.train_server(training, received)

    def train_group(
        self,
        training: Training,
        group: Sequence[Job],
        stem: Path,
        received: dict[str, Tensor],
    ) -> None:
        """Train a group and write what it sends, unless another arm did the same work."""
        clients = [job.client for job in group]
        honest = not training.poisoning.clients & set(clients)
        if honest and training.shared.take(clients, lambda name: stem.with_name(stem.name + name.removeprefix(MANY))):
            return
        began = time.perf_counter()
        trained = self.run(group, received)
        seconds = (time.perf_counter() - began) / len(group)
        parts = {"": trained.parameters, f"_{BUFFERS}": trained.buffers}
        save_many(clients, parts, claims(group, trained, training.round.index, seconds), stem)
        if honest:
            endings = [".json", *(f"{part}.safetensors" for part, tensors in parts.items() if tensors)]
            training.shared.keep(clients, [(MANY + end, stem.with_name(stem.name + end)) for end in endings])

    def train_server(self, training: Training, received: dict[str, Tensor]) -> None:
        """The same of the server, on examples of its own."""
        folder = training.folder.client(training.round.index, SERVER)
        if training.shared.take([SERVER], folder.joinpath):
            return
        own = self.run([self.job(training, SERVER)], received)
        with atomic_folder(folder) as partial:
            save_file({name: value[0].contiguous() for name, value in own.parameters.items()}, partial / MODEL_FILE)
        training.shared.keep([SERVER], [(MODEL_FILE, folder / MODEL_FILE)])

    def settings(self, index: int, training: TrainingSettings | None = None) -> TrainingSettings:
        """The training of a round: the learning rate is that of its middle, the same for all of its steps."""
        training = training or self.config.training
        progress = (index - 0.5) / self.config.federation.rounds
        return training.model_copy(update={"learning_rate": training.learning_rate * factor(training, progress)})

    def job(self, training: Training, client: int) -> Job:
        """What a client does; one whose examples the adversary changes draws from a pool of its own."""
        places, pool, poisoning = self.places(client), self.pool, training.poisoning
        samples, local = len(places), None
        if client in poisoning.clients:
            own = self.checked(poisoning.change(client, self.examples.train.rows(places.tolist())))
            local = poisoning.local(client)
            places, pool = torch.arange(len(own.y)), own if self.prepare is not as_it_is else self.prepared(own)
        seed = training.round.seed_for(client_name(client), "train")
        settings = self.settings(training.round.index, poisoning.training(client, self.config.training))
        return Job(client, pool, self.procedure.plan(places, settings, seed), samples, seed, settings, local)

    def victim(self, received: Path, index: int, client: int) -> Victim:
        """The learning rate is that of the round; `batch_size` is that of a whole batch."""
        settings, size = self.settings(index), len(self.places(client))
        state, model = self.load(received), copy.deepcopy(self.model)
        model.load_state_dict(state)
        bounds = None
        if self.examples.train.x.dtype == torch.uint8:
            black, white = (torch.full(self.work.shape, value, dtype=torch.uint8)[None] for value in (0, 255))
            prepare = self.procedure.prepare(self.work)
            bounds = prepare(black)[0], prepare(white)[0]
        return Victim(
            learning_rate=settings.learning_rate,
            steps=self.steps(client),
            batch_size=min(settings.batch_size or size, size),
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum if settings.optimizer == "sgd" else 0.0,
            max_grad_norm=settings.max_grad_norm,
            model=model.train(),
            buffers={name: value for name, value in state.items() if name not in self.parameters},
            shape=tuple(self.prepare(self.pool.x[:1]).shape[1:]),
            classes=self.work.classes,
            bounds=bounds,
        )

    def truth(self, folder: ArmFolder, round: Round, client: int) -> Truth:
        """The batches of an honest client are planned before it trains, by its name and the round."""
        seed = round.seed_for(client_name(client), "train")
        work = self.procedure.plan(self.places(client), self.settings(round.index), seed)
        used = torch.cat([row[:size] for row, size in zip(work.indices, work.sizes.tolist(), strict=True)])
        distinct = torch.tensor(sorted(set(used.tolist())))
        return Truth(self.prepare(self.pool.x[distinct]), self.pool.y[distinct], self.pool.y[used])

    def checked(self, made: Arrays) -> Arrays:
        """Examples that an attack made, if a model can be trained and tested on them."""
        if not len(made.y):
            raise InputError("the attack found no example to act on; give it another source class")
        if int(made.y.max()) >= self.work.classes or int(made.y.min()) < 0:
            raise InputError(f"the attack made an example of class {int(made.y.max())}; there are {self.work.classes}")
        return made

    def together(self, received: dict[str, Tensor]) -> int:
        """How many clients to train side by side; 1: one after another."""
        asked = self.config.training.together
        if asked is False or (asked is None and not pays(self.model, self.config.training.threads)):
            return 1
        if not (self.procedure.stackable and can_be_stacked(self.model)):
            return 1
        one = self.prepare(self.pool.x[: self.config.training.batch_size or max(map(len, self.examples.shards))])
        return clients_at_once(self.model, received, one, parse_bytes(self.config.federation.memory))

    def run(self, group: Sequence[Job], received: dict[str, Tensor]) -> Trained:
        """Train a group of clients that draw from one pool, in one way."""
        works, pool, settings = [job.work for job in group], group[0].pool, group[0].settings
        if len(group) > 1:
            return self.side_by_side.train(received, pool, works, settings)
        (job,) = group
        one = self.procedure.train_one if job.local is None else functools.partial(train_one, local=job.local)
        return train_each(self.model, received, pool, works, settings, self.prepare, [job.seed], one)

    def evaluate(self, folder: Path) -> dict[str, float]:
        """The test's metrics, measured on the main process and told to the others."""
        measured = self.test(folder) if self.world.is_main else None
        metrics: dict[str, float] = self.world.gather(measured)[0]
        return metrics

    def wanted(self, goal: Callable[[Any], Any]) -> Any:
        """Some of the test examples, changed."""
        return self.checked(goal(self.examples.test))

    def success(self, folder: Path, goal: Callable[[Any], Any]) -> float:
        """How often a model gives the labels that an attack wants."""
        wanted = self.test(folder, self.wanted(goal))["accuracy"] if self.world.is_main else None
        rate: float = self.world.gather(wanted)[0]
        return rate

    @torch.inference_mode()
    def test(self, folder: Path, examples: Arrays | None = None) -> dict[str, float]:
        """What the procedure measures on the test examples, or on others."""
        torch.set_num_threads(self.config.training.threads)
        self.model.load_state_dict(self.load(folder))
        self.model.eval()
        return self.procedure.test(self.model, examples or self.examples.test, self.procedure.prepare(self.work))

    @torch.inference_mode()
    def show(self, model: Path, folder: Path) -> None:
        """Draw what a generator makes."""
        self.model.load_state_dict(self.load(model))
        images = self.procedure.images(self.model)
        if images is not None:
            draw_samples(images.numpy(), folder)


def as_it_is(x: Tensor) -> Tensor:
    """Examples that were prepared before."""
    return x
