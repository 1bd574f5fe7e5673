"""The clients of FedGKT (arXiv:2007.14513): each keeps a small network of its own, and sends features, logits, labels.

A client's network lies in the folder of the last round in which it took part, what it sends beside it. The server's
logits for its examples lie in the server's folder of that round.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedllm_sec.config import Config
from fedllm_sec.federation.buffers import FILE as BUFFERS_FILE
from fedllm_sec.federation.examples import Examples
from fedllm_sec.federation.jobs import claims
from fedllm_sec.federation.learner import Training
from fedllm_sec.federation.models import ModelLearner
from fedllm_sec.federation.optimizers import optimizer
from fedllm_sec.federation.run_folder import ArmFolder, client_name
from fedllm_sec.federation.world import World
from fedllm_sec.models.split import Halves
from fedllm_sec.settings import TrainingSettings
from fedllm_sec.tasks.arrays import Arrays, ArrayTask
from fedllm_sec.training.procedure import classification_metrics
from fedllm_sec.training.small import Trained
from fedllm_sec.training.transfer import AT_ONCE, Knowledge, Transfer, extract, train_client
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import atomic_folder, write_json
from fedllm_sec.updates.sources import MODEL_FILE, all_finite

KNOWLEDGE_FILE = "knowledge.safetensors"  # what a client sends; deleted when the server has learned from it
LARGEST = 1e4  # of a feature or a logit; behind a normalisation they are of order one
CLIENT = "client"  # in the server's first folder: the network that every client begins with
ANSWER = "logits"  # the only tensor of a file `client_03.safetensors` in a folder of the server's


class KnowledgeLearner(ModelLearner):
    """`Learner` for a network in two halves; the global model of the run's folder is the server's half.

    Args:
        halves: the architecture; its weights are those that a run begins with, the same for all clients.
        description: of it.
        work: the task.
        examples: of the clients and the test.
        config: the experiment's, with an optimizer that exchanges knowledge.
        world: the processes.
    """

    def __init__(
        self, halves: Halves, description: str, work: ArrayTask, examples: Examples, config: Config, world: World
    ):
        super().__init__(halves.server, description, work, examples, config, world)
        made = optimizer.build(config.federation.optimizer.name, config.federation.optimizer.parameters)
        assert made.transfer is not None
        self.transfer: Transfer = made.transfer
        self.edge = halves.edge
        self.first_edge = {name: value.detach().clone() for name, value in halves.edge.state_dict().items()}

    def start(self, folder: Path) -> None:
        """Write the server's first network, and below it the clients'."""
        self.model.load_state_dict(self.first)
        self.edge.load_state_dict(self.first_edge)
        with atomic_folder(folder) as partial:
            save_network(self.model, partial)
            (partial / CLIENT).mkdir()
            save_network(self.edge, partial / CLIENT)

    def train(self, training: Training) -> None:
        """Train one after another."""
        torch.set_num_threads(self.config.training.threads)
        settings = self.settings(training.round.index)
        for client in training.clients:
            steps = self.train_one(training, client, settings)
            training.progress.client_step(client, steps)

    def train_one(self, training: Training, client: int, settings: TrainingSettings) -> int:
        """Train a client's own network from where it left it, write it and what it sends; return its steps."""
        began, index = time.perf_counter(), training.round.index
        job = self.job(training, client)
        places = self.places(client)
        own = (
            job.pool
            if client in training.poisoning.clients
            else job.pool._replace(x=job.pool.x[places], y=job.pool.y[places])
        )
        work = self.procedure.plan(torch.arange(len(own.y)), settings, job.seed)
        teacher = answer(training.folder, index - 1, client)
        if teacher is not None and len(teacher) != len(own.y):
            raise InputError(
                f"{client_name(client)}: has {len(own.y)} examples, but the server's logits are for {len(teacher)}; "
                "fedgkt needs the same examples in every round: leave out redraw"
            )
        self.edge.load_state_dict(self.load(own_network(training.folder, index - 1, client)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            loss = train_client(self.edge, own, teacher, work, settings, self.transfer, self.prepare)
        sent = extract(self.edge, own, self.prepare)
        trained = Trained({}, {}, torch.tensor([loss], dtype=torch.float64), torch.tensor([len(work.sizes)]))
        with atomic_folder(training.folder.client(index, client)) as partial:
            save_network(self.edge, partial)
            save_file({name: value.contiguous() for name, value in sent._asdict().items()}, partial / KNOWLEDGE_FILE)
            (claim,) = claims([job], trained, index, time.perf_counter() - began)
            write_json(partial / "client.json", claim)
        return len(work.sizes)

    def show(self, model: Path, folder: Path) -> None:
        """Half a network makes nothing that could be drawn."""

    def evaluate(self, folder: Path) -> dict[str, float]:
        """The mean over all clients of what each one's extractor and the server's network give on the test examples.

        `client_accuracy` is that of the clients' own small networks. A client that never took part has its first one.
        """
        return self.mean_over_clients(folder, self.examples.test)

    def success(self, folder: Path, goal: Callable[[Any], Any]) -> float:
        """As `evaluate`, of the labels that an attack wants."""
        return self.mean_over_clients(folder, self.checked(goal(self.examples.test)))["accuracy"]

    def mean_over_clients(self, folder: Path, test: Arrays) -> dict[str, float]:
        """The mean over all clients of what `test_client` gives."""
        arm, index = ArmFolder(folder.parent), int(folder.name.rpartition("_")[2])
        networks = [own_network(arm, index, client) for client in range(self.config.federation.clients)]
        here = {str(path): self.test_client(folder, path, test) for path in self.world.share(sorted(set(networks)))}
        found: dict[str, Any] = {}
        for measured in self.world.gather(here):
            found.update(measured)
        rows = [found[str(path)] for path in networks]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    @torch.inference_mode()
    def test_client(self, folder: Path, network: Path, test: Arrays) -> dict[str, float]:
        """The metrics of a client's extractor with the server's network, and the accuracy of its own classifier."""
        torch.set_num_threads(self.config.training.threads)
        self.model.load_state_dict(self.load(folder))
        self.edge.load_state_dict(self.load(network))
        self.model.eval()
        self.edge.eval()
        prepare = self.procedure.prepare(self.work)
        logits, own = [], []
        for part in torch.split(test.x, AT_ONCE):
            features, small = self.edge(prepare(part))
            logits.append(self.model(features))
            own.append(small)
        alone = classification_metrics(torch.cat(own), test.y)
        return {**classification_metrics(torch.cat(logits), test.y), "client_accuracy": alone["accuracy"]}

    def check_sent(self, path: Path) -> None:
        """Raise InputError unless a client sent finite features, logits and labels of the right shapes and classes."""
        sent = read_knowledge(path)
        with torch.inference_mode():
            self.edge.eval()
            features, logits = self.edge(self.prepare(self.pool.x[:1]))
        shapes = {"features": features.shape[1:], "logits": logits.shape[1:], "labels": ()}
        if sent.labels.dim() != 1:
            raise InputError(f"sent labels of shape {tuple(sent.labels.shape)}, which should be a list")
        for name, value in sent._asdict().items():
            kind = torch.int64 if name == "labels" else features.dtype
            if value.dtype != kind or value.shape != (len(sent.labels), *shapes[name]) or not len(value):
                raise InputError(f"sent {name} of shape {tuple(value.shape)}, {value.dtype}, which do not fit")
            if value.is_floating_point() and not all_finite(value):
                raise InputError(f"sent {name} that are not finite")
            if value.is_floating_point() and float(value.abs().max()) > LARGEST:
                raise InputError(
                    f"sent {name} as large as {float(value.abs().max()):.3g}; more than {LARGEST:g} is noise"
                )
        if int(sent.labels.min()) < 0 or int(sent.labels.max()) >= self.work.classes:
            raise InputError(f"sent a label that is no class from 0 to {self.work.classes - 1}")


def save_network(network: nn.Module, folder: Path) -> None:
    """Write the parameters and the buffers of a network into a folder that exists."""
    save_file({name: value.detach().contiguous() for name, value in network.named_parameters()}, folder / MODEL_FILE)
    if buffers := dict(network.named_buffers()):
        save_file(buffers, folder / BUFFERS_FILE)


def own_network(folder: ArmFolder, index: int, client: int) -> Path:
    """Where a client's network is after round `index`: in the last round in which it took part, or where all begin."""
    rounds = (folder.client(earlier, client) for earlier in range(index, 0, -1))
    return next((place for place in rounds if place.exists()), folder.global_model(0) / CLIENT)


def answer_file(folder: Path, client: str) -> Path:
    """Where the server's logits for a client's examples are, in a folder of the server's."""
    return folder / f"{client}.safetensors"


def answer(folder: ArmFolder, index: int, client: int) -> Tensor | None:
    """The server's last logits for a client's examples after round `index`, or None where it has told none."""
    name = client_name(client)
    files = (answer_file(folder.global_model(earlier), name) for earlier in range(index, 0, -1))
    path = next((path for path in files if path.exists()), None)
    return None if path is None else load_file(path)[ANSWER]


def read_knowledge(path: Path) -> Knowledge:
    """Read what a client sent.

    Raises:
        InputError: if the file is missing, is not whole, or holds other tensors.
    """
    try:
        return Knowledge(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise InputError(f"{path.name}: cannot be read ({type(error).__name__}: {str(error)[:100]})") from None
