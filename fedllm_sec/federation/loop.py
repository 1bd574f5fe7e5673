"""One arm: rounds of local training, the server's step and evaluation. Every arrow between two steps is a file."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm_sec.config import Config
from fedllm_sec.core import Round
from fedllm_sec.federation.adversary import Adversary, Poisoning
from fedllm_sec.federation.curious import Curious, mean_leakage
from fedllm_sec.federation.knowledge import KnowledgeLearner
from fedllm_sec.federation.knowledge_server import KnowledgeServer
from fedllm_sec.federation.learner import Learner, Training, finite
from fedllm_sec.federation.methods import Methods
from fedllm_sec.federation.participants import participants
from fedllm_sec.federation.progress import RoundProgress
from fedllm_sec.federation.run_folder import SERVER, ArmFolder, client_name
from fedllm_sec.federation.server import Server
from fedllm_sec.federation.stealth import mean_stealth
from fedllm_sec.federation.success import lifespan
from fedllm_sec.federation.trackers import Trackers
from fedllm_sec.federation.world import World
from fedllm_sec.reports.read import SUCCESS
from fedllm_sec.settings import ArmSettings
from fedllm_sec.updates.admit import Refusal
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.files import read_json, write_json, write_text

logger = logging.getLogger(__name__)

MAJORITY = "majority_accuracy"  # the same in every round: not worth a line


@dataclass(frozen=True)
class Arm:
    """One curve of an experiment: what it runs, on what, and where it goes.

    Attributes:
        name: of the arm.
        settings: its attack and defenses.
        methods: the same, built.
        config: the experiment's.
        folder: where it goes.
        world: the processes.
        learner: what is trained.
        goals: what attacks want, by the name of the metric that says how often a model does so.
        cache: where arms of one configuration share what honest clients send; None: they do not.
    """

    name: str
    settings: ArmSettings
    methods: Methods
    config: Config
    folder: ArmFolder
    world: World
    learner: Learner
    goals: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    cache: Path | None = None

    def run(self) -> None:
        """Run the rounds that are not whole yet."""
        rounds = self.config.federation.rounds
        done = next((i for i in range(rounds + 1) if self.folder.metrics(i) is None), rounds + 1)
        self.world.wait()  # nobody writes before everybody has looked
        names = self.config.trackers if self.world.is_main else ()
        with (
            RoundProgress(self.name, rounds, max(done - 1, 0), self.world) as progress,
            Trackers(names, f"{self.config.name}/{self.name}", self.folder.path) as trackers,
        ):
            for index in range(done, rounds + 1):
                began = time.perf_counter()
                if self.world.is_main and index:
                    self.folder.clear_unfinished(index)
                    self.folder.round(index).mkdir()
                self.world.wait()
                facts = self.train_and_aggregate(index, progress, began) if index else {}
                trackers.log(index, self.finish(index, facts, progress, began))
        if self.world.is_main:
            self.learner.show(self.folder.global_model(rounds), self.folder.path)

    def train_and_aggregate(self, index: int, progress: RoundProgress, began: float) -> dict[str, Any]:
        """Train the clients of a round and make the next global model; return what there is to say of it."""
        present = participants(self.config.federation, self.config.seed, index)
        trainees = [*present, *([SERVER] if self.learner.has_root and self.methods.defenses else [])]
        progress.begin_round(index, {client: self.learner.steps(client) for client in trainees})
        round = self.round(index)
        poisoning = self.adversary.first_training(round, present)
        here, victims = self.world.share(trainees), frozenset(self.curious.victims(index, present))
        self.train(Training(round, self.folder, here, poisoning, progress, cache=self.cache, victims=victims))
        if last := self.adversary.last_training(round, present):
            self.train_again(round, last, progress)
        return self.serve(round, present, time.perf_counter() - began) if self.world.is_main else {}

    def train_again(self, round: Round, poisoning: Poisoning, progress: RoundProgress) -> None:
        """Train the malicious clients that have now seen what others sent."""
        here = self.world.share(sorted(poisoning.clients))
        if self.world.is_main:
            self.folder.again(round.index).mkdir()
        self.world.wait()
        self.train(Training(round, self.folder, here, poisoning, progress, again=True, cache=self.cache))

    def train(self, training: Training) -> None:
        """Train this process's clients, and wait for those of the others."""
        self.learner.train(training)
        told = self.world.gather([training.shared.linked, len(training.clients)])
        if self.world.is_main:
            linked = [client for one, _ in told for client in one]
            training.shared.note(linked, sum(count for _, count in told), training.out)
        self.world.wait()

    @property
    def adversary(self) -> Adversary:
        """Who acts for the attack."""
        return Adversary(self.folder, self.settings, self.methods.attack, self.config)

    @property
    def curious(self) -> Curious:
        """Who looks at what clients sent."""
        return Curious(self.adversary, self.learner)

    @property
    def server(self) -> Server:
        """The server's side."""
        if isinstance(self.learner, KnowledgeLearner):
            return KnowledgeServer(self.folder, self.settings, self.methods, self.config, self.learner)
        return Server(self.folder, self.settings, self.methods, self.config)

    def serve(self, round: Round, present: Sequence[int], training_wall: float) -> dict[str, Any]:
        """What a curious server finds out, and the server's step, on the main process."""
        took = self.curious.look(round, present)
        began = time.perf_counter()
        refusals = self.server.step(round, present)
        times = {"training_wall_seconds": training_wall, "server_seconds": time.perf_counter() - began}
        facts = self.facts(round, present, refusals, times)
        if took:
            facts["times"]["reconstruction_seconds"] = took
            facts["victims"] = list(took)
        return facts

    def facts(
        self, round: Round, present: Sequence[int], refusals: Sequence[Refusal], times: Mapping[str, float]
    ) -> dict[str, Any]:
        """What there is to say of a round besides the test."""
        claims = {client_name(c): sent.claims for c, sent in self.folder.sent(round.index, present).items()}
        trainer = math.fsum(claim["seconds"] for claim in claims.values())
        malicious = self.adversary.malicious(round.index, present)
        decisions = sorted(self.folder.round(round.index).glob("*/decision.json"))
        found = sorted(self.folder.round(round.index).glob("adversary_*.json"))
        return {
            "times": {"trainer_seconds": trainer, **times},
            "malicious": [client_name(client) for client in malicious],
            "adversary": {path.stem.removeprefix("adversary_"): read_json(path) for path in found},
            "refused": {refusal.client: refusal.reason for refusal in refusals},
            "skipped": self.folder.skipped(round.index),
            "decisions": {path.parent.name: read_json(path) for path in decisions},
            "train_loss": {client: claim["loss"] for client, claim in claims.items()},
            "num_samples": {client: claim["num_samples"] for client, claim in claims.items()},
        }

    def finish(
        self, index: int, facts: dict[str, Any], progress: RoundProgress, began: float
    ) -> dict[str, float | None]:
        """Evaluate the round's global adapter and write the metrics, which makes the round whole; return them."""
        self.world.wait()
        measured = self.measure(index)
        metrics = {key: finite(value) for key, value in measured.items()}
        seconds = time.perf_counter() - began
        if self.world.is_main:
            self.folder.round(index).mkdir(exist_ok=True)
            times = {"processes": self.world.size, **facts.pop("times", {}), "round_seconds": seconds}
            write_json(self.folder.round(index) / "timing.json", times)
            self.folder.finish_round(index, {"round": index, **metrics, **facts})
        shown = "  ".join(f"{key} {value:.4g}" for key, value in measured.items() if "/" not in key and key != MAJORITY)
        progress.end_round(index, f"{self.name:>9} round {index}: {shown}  ({seconds:.1f} s)")
        self.world.wait()
        return metrics

    def measure(self, index: int) -> dict[str, float]:
        """The metrics of a round's global model, and of the attack on it."""
        model = self.folder.global_model(index)
        measured = self.learner.evaluate(model)
        measured |= {name: self.learner.success(model, goal) for name, goal in self.goals.items()}
        last = self.adversary.last_round
        if SUCCESS in self.goals and 0 < last < index:
            earlier = [float((self.folder.metrics(i) or {})[SUCCESS]) for i in range(last + 1, index)]
            measured["lifespan"] = lifespan([*earlier, measured[SUCCESS]])
        return measured | mean_stealth(self.folder.round(index)) | mean_leakage(self.folder.reconstructed(index))

    def round(self, index: int) -> Round:
        """What the server knows of a round."""
        before = next((i for i in range(index - 1, 0, -1) if self.folder.skipped(i) is None), 0)
        previous = self.folder.round(before) if before else None
        return Round(index, self.folder.round(index), self.config.seed, previous)


def prepare_arm(folder: ArmFolder, config: str, environment: dict[str, Any], learner: Learner) -> None:
    """Write what an arm begins with: its configuration, its environment and the first global model."""
    folder.path.mkdir(exist_ok=True)
    known = folder.path / "environment.json"
    if known.exists():
        before = read_json(known)
        if before["data"] != environment["data"]:
            raise InputError(
                f"{folder.path}: the data (or an architecture) is not what this run began with; it cannot be resumed"
            )
        if changed := sorted(key for key in environment if environment[key] != before.get(key)):
            logger.warning("%s: resumed in another environment: %s", folder.path, ", ".join(changed))
            write_json(folder.path / "environment_resumed.json", environment)
    else:
        write_text(folder.path / "config.yaml", config)
        write_json(known, environment)
    if not folder.global_model(0).exists():
        learner.start(folder.global_model(0))
